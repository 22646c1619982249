"""Standard output and error that may go away: a closed pipe or terminal ends what is shown, not what is done."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Steady:
    """A text stream that swallows everything once nobody reads it any more; in all else the stream it stands for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._lose()
        return len(text)

    def flush(self) -> None:
        """Bring what is pending to whoever reads, or lose it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Let all that comes, and what is still pending, go nowhere: Python writes that again at the end."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the block nothing is ended by a closed pipe on standard output or error."""
    before = sys.stdout, sys.stderr
    steady = [Steady(stream) if stream is not None else None for stream in before]  # None: pythonw has no terminal
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        for stream in steady:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
