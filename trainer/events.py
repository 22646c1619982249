"""What a run tells. Tab, command line, CSV and tests read the same events."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Anything a run tells; `at` is the unix time in seconds."""

    at: float = field(default_factory=time.time, kw_only=True)

    def as_dict(self) -> dict[str, object]:
        """Plain values for a JSON line; `event` is the kind."""
        return {"event": type(self).__name__.lower(), **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Note(Event):
    """A line for the log; `level` is info, warning or error."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Preflight(Event):
    """What the run will do, before its first step: name → value, ready to show."""

    report: dict[str, object]


@dataclass(frozen=True)
class Opened(Event):
    """The run folder is there, with the job in it."""

    folder: str


@dataclass(frozen=True)
class Stage(Event):
    """Progress of something before or between the steps (encoding pictures, sampling): `done` of `total`."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step: its loss and learning rates, told in groups when the losses are read, at least
    once a second unless one step takes longer. `skipped`: how many steps up to it were left out because fp16 gradients
    overflowed.
    """

    step: int
    total: int
    loss: float
    loss_ema: float
    rates: tuple[float, ...]
    images_per_second: float
    seconds_left: float
    skipped: int = 0


@dataclass(frozen=True)
class Sampled(Event):
    """Sample pictures were written."""

    step: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Saved(Event):
    """A LoRA file was written and re-opened; `final` is false for intermediate saves."""

    path: str
    step: int
    final: bool = False


@dataclass(frozen=True)
class Finished(Event):
    """The run is over. `reason` is done, stopped, saved_early or failed; `path` the LoRA file or None."""

    reason: str
    path: str | None
    step: int
    error: str = ""


class EventLog:
    """Hands every event to every listener, in order. Not a queue: listeners that want one keep their own."""

    def __init__(self, *listeners: Callable[[Event], None]) -> None:
        self._listeners = list(listeners)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Add a listener."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[Event], None]) -> None:
        """Remove a listener."""
        self._listeners.remove(listener)

    def tell(self, event: Event) -> None:
        """Hand the event to all listeners."""
        for listener in self._listeners:
            listener(event)

    def progress(self, name: str, done: int, total: int) -> None:
        """Tell how far something is that happens before or between the steps."""
        self.tell(Stage(name, done, total))

    def note(self, text: str) -> None:
        """Tell an info line."""
        self.tell(Note(text))

    def warn(self, text: str) -> None:
        """Tell a warning line."""
        self.tell(Note(text, "warning"))
