"""What a running job tells, gathered for whoever asks: status, loss curve, log, recent events."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..events import Event, Finished, Note, Opened, Preflight, Sampled, Saved, Stage, Step
from .curve import Curve
from .entry import FAILED, Entry

LINES = 300
EVENTS = 2000
PICTURES = 16


@dataclass
class Facts:
    """What is known of the current (or last) run."""

    entry: Entry
    step: int = 0
    total: int = 0
    loss: float | None = None
    loss_ema: float | None = None
    rates: tuple[float, ...] = ()
    images_per_second: float | None = None
    seconds_per_step: float | None = None
    seconds_left: float | None = None
    stage: Stage | None = None
    report: Mapping[str, object] = field(default_factory=dict)
    samples: tuple[str, ...] = ()
    sampled_at: int = 0
    saved: list[Saved] = field(default_factory=list)
    folder: str = ""
    stopping: bool = False
    ended: bool = False


class Live:
    """Listens to the events of the runs, one run after the other, and answers questions from other threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        # Numbers that a page still holds from before a restart must not mean something else afterwards.
        self._sequence = time.time_ns() // 1_000_000
        self._curve = Curve(self._sequence)
        self._events: deque[dict[str, object]] = deque(maxlen=EVENTS)
        self._lines: deque[dict[str, object]] = deque(maxlen=LINES)

    # ---------------------------------------------------------------- telling

    def begin(self, entry: Entry) -> None:
        """A job starts; the curve of the one before is forgotten."""
        with self._lock:
            self._facts = Facts(entry, folder=entry.folder)
            self._curve = Curve(self._curve.revision + 1)
            self._remember({"event": "began", "at": time.time(), "id": entry.id, "name": entry.name})

    def end(self, entry: Entry) -> None:
        """The job is over and its host has everything back."""
        with self._lock:
            if self._facts is not None:
                self._facts.entry, self._facts.ended, self._facts.stage = entry, True, None
            self._remember({"event": "ended", "at": time.time(), "id": entry.id, "state": entry.state})
            if entry.state == FAILED:
                self._line(Note(entry.error, "error"))

    def stopping(self) -> None:
        """A stop was asked for."""
        with self._lock:
            if self._facts is not None:
                self._facts.stopping = True

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        with self._lock:
            self._remember(event.as_dict())
            facts = self._facts
            if isinstance(event, Note):
                self._line(event)
            elif facts is None or isinstance(event, Finished):
                return
            elif isinstance(event, Step):
                self._step(facts, event)
            elif isinstance(event, Stage):
                facts.stage = event if event.done < event.total else None
            else:
                self._other(facts, event)

    def _step(self, facts: Facts, event: Step) -> None:
        facts.stage = None
        facts.step, facts.total = event.step, event.total
        facts.loss, facts.loss_ema, facts.rates = event.loss, event.loss_ema, event.rates
        facts.images_per_second, facts.seconds_left = event.images_per_second, event.seconds_left
        if event.total > event.step:
            facts.seconds_per_step = event.seconds_left / (event.total - event.step)
        self._curve.add(event)

    def _other(self, facts: Facts, event: Event) -> None:
        if isinstance(event, Preflight):
            facts.report = event.report
        elif isinstance(event, Opened):
            facts.folder = event.folder
        elif isinstance(event, Sampled):
            facts.samples, facts.sampled_at = event.paths[:PICTURES], event.step
            self._line(Note(f"Generated {len(event.paths)} sample image(s) at step {event.step}.", at=event.at))
        elif isinstance(event, Saved):
            facts.saved.append(event)
            self._line(Note(f"Saved {_base_name(event.path)} (step {event.step}).", at=event.at))

    def _remember(self, told: Mapping[str, object]) -> None:
        self._sequence += 1
        self._events.append({"seq": self._sequence, **told})

    def _line(self, note: Note) -> None:
        entry = None if self._facts is None else self._facts.entry
        run, name = ("", "") if entry is None else (f"{entry.id} {entry.started}", entry.name)
        line = {"seq": self._sequence, "at": note.at, "level": note.level, "text": note.text}
        self._lines.append({**line, "run": run, "name": name})

    # ---------------------------------------------------------------- asking

    def facts(self) -> Facts | None:
        """A copy of what is known of the current or last run; None before the first."""
        with self._lock:
            if self._facts is None:
                return None
            copy = Facts(**vars(self._facts))
            copy.saved = list(copy.saved)
            return copy

    def curve(self, revision: int = -1, start: int = 0) -> dict[str, object]:
        """The loss curve from point `start` on for who holds `revision`, else all of it (see `Curve.since`)."""
        with self._lock:
            return self._curve.since(revision, start)

    def lines(self, after: int = 0) -> list[dict[str, object]]:
        """The log lines told after sequence number `after`: seq, at, level, text, and the run and its name."""
        with self._lock:
            return [dict(line) for line in self._lines if int(str(line["seq"])) > after]

    def events(self, after: int = 0) -> list[dict[str, object]]:
        """The events told after sequence number `after`, each with its `seq`; of long runs only the last 2,000."""
        with self._lock:
            return [dict(event) for event in self._events if int(str(event["seq"])) > after]


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]
