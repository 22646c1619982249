"""How a run is asked to stop, from another thread or a signal handler."""

from __future__ import annotations

import threading


class Control:
    """Stop requests. A run looks at it between steps; `save` asks for the file as it stands."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._save = False

    def stop(self, *, save: bool = False) -> None:
        """Ask the run to end at the next step boundary; with `save` the LoRA is written first."""
        self._save = self._save or save
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop.is_set()

    @property
    def saving(self) -> bool:
        """Whether the file is wanted on stopping."""
        return self._save
