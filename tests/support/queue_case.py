"""A queue whose worker does what a test tells it, and helpers to wait without guessing times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine.control import Control
from trainer.events import EventLog, Opened, Step
from trainer.jobs.entry import Entry
from trainer.jobs.queue import Outcome, Queue
from trainer.jobs.store import open_store

PATIENCE = 60.0


def step(number: int, total: int = 10, loss: float = 1.0) -> Step:
    return Step(number, total, loss, loss / 2, (1e-4,), 8.0, float(total - number))


class Gate:
    """A worker that opens its run folder, then waits in every job until the test lets it go or it is stopped."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[Entry] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.open: dict[str, threading.Event] = {}
        self.fails: dict[str, BaseException] = {}

    def control(self) -> Control:
        return Control()

    def can_resume(self, folder: Path) -> bool:
        return (folder / "state").is_file()

    def let_go(self, name: str) -> None:
        self._gate(name).set()

    def _gate(self, name: str) -> threading.Event:
        with self._lock:
            return self.open.setdefault(name, threading.Event())

    def run(self, entry: Entry, log: EventLog, control: Any) -> Outcome:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._run(entry, log, control)
        finally:
            with self._lock:
                self._at_once -= 1

    def _run(self, entry: Entry, log: EventLog, control: Any) -> Outcome:
        self.ran.append(entry)
        folder = Path(entry.folder) if entry.resume else self.root / "runs" / entry.id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").touch()
        log.tell(Opened(str(folder)))
        log.tell(step(1))
        gate = self._gate(entry.name)
        while not gate.wait(0.002):
            if control.stopping:
                path = str(folder / f"{entry.name}.safetensors") if control.saving else ""
                return Outcome("saved_early" if control.saving else "stopped", path, str(folder))
        if entry.name in self.fails:
            raise self.fails[entry.name]
        log.tell(step(10))
        return Outcome("done", str(folder / f"{entry.name}.safetensors"), str(folder))


def job(name: str, **more: object) -> dict[str, object]:
    return {"format": 1, "mode": "iLECO", "save_lora_name": name, **more}


def make(root: Path, worker: Gate | None = None) -> tuple[Queue, Gate]:
    """A queue in `root`, as after a start of the program."""
    gate = worker or Gate(root)
    return Queue(open_store(root / "queue"), gate), gate


def until(true: Callable[[], object], patience: float = PATIENCE, pause: float = 0.002) -> None:
    """Wait until something holds, looking every `pause` seconds; fails after `patience` seconds."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def names(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.name for entry in entries]
