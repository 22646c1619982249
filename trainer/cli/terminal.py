"""How events look on a terminal: a progress bar, notes above it; or one JSON object per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from ..events import Event, Finished, Note, Preflight, Sampled, Saved, Stage, Step


def json_lines(stream: TextIO) -> Any:
    """A listener that writes every event as one JSON line."""

    def listen(event: Event) -> None:
        print(json.dumps(event.as_dict(), ensure_ascii=False), file=stream, flush=True)

    return listen


def worded(value: object) -> str:
    """A value of a report as a reader expects it, not as Python writes it."""
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {worded(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(worded, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


TO_A_FILE = 5.0
"""Seconds between two lines of a bar where nobody watches it."""


class Terminal:
    """A listener for people: a bar for stages and steps, lines for everything else."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._name = ""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Step):
            bar = self._open("training", event.total, "step")
            bar.set_postfix_str(
                f"loss {event.loss_ema:.4f}, rate {max(event.rates, default=0):.2e}, "
                f"{event.images_per_second:.1f} images/s",
                refresh=False,
            )
            self._advance(event.step)
        elif isinstance(event, Stage):
            self._open(event.name, event.total, "it")
            self._advance(event.done)
        elif isinstance(event, Preflight):
            self.close()
            width = max(map(len, event.report))
            for name, value in event.report.items():
                self._line(f"  {name:<{width}}  {worded(value)}")
        else:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Note):
            self._line(event.text if event.level == "info" else f"{event.level}: {event.text}")
        elif isinstance(event, Saved):
            self._line(f"Saved {event.path} (step {event.step}).")
        elif isinstance(event, Sampled):
            self._line(f"Generated {len(event.paths)} sample image(s) at step {event.step}.")
        elif isinstance(event, Finished):
            self.close()
            if event.reason == "stopped":
                self._line(f"Stopped after step {event.step}.")

    def _open(self, name: str, total: int, unit: str) -> Any:
        if self._bar is None or self._name != name:
            self.close()
            self._name = name
            watched = self._stream.isatty()
            self._bar = tqdm(
                total=total, desc=name, unit=unit, file=self._stream, leave=True, dynamic_ncols=watched,
                mininterval=0.1 if watched else TO_A_FILE, miniters=1 if watched else 0,
                delay=0 if watched or unit == "step" else TO_A_FILE,
            )  # fmt: skip
        return self._bar

    def _advance(self, done: int) -> None:
        self._bar.update(max(done - self._bar.n, 0))
        if done >= self._bar.total:
            self.close()

    def _line(self, text: str) -> None:
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """End the bar that is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
