"""The queue: takes jobs from several threads, works them off one at a time in one thread of its own, and survives what
happens to them.
"""
from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import AtelierError, JobError, Problem
from ..events import Event, EventLog, Opened, Step
from .entry import DONE, ENDED, FAILED, INTERRUPTED, RUNNING, SAVED, STOPPED, UNTITLED, WAITING, Entry, new_entry
from .live import Facts, Live
from .store import Store

KEPT = 50
"""Entries that are over and stay listed."""

_STATES = {"done": DONE, "stopped": STOPPED, "saved_early": SAVED}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `reason` is done, stopped or saved_early; the LoRA and the run folder, "" without."""

    reason: str
    path: str = ""
    folder: str = ""


class Worker(Protocol):
    """Who carries out a job. It knows engine and host; the queue does not."""

    def control(self) -> Any:
        """Something with `stop(save=False)`, new for every run."""

    def run(self, entry: Entry, log: EventLog, control: Any) -> Outcome:
        """Carry out the job of an entry; raises what goes wrong."""

    def can_resume(self, folder: Path) -> bool:
        """Whether a run folder holds a state to go on from."""


class QueueError(AtelierError):
    """Something that cannot be done with the queue as it is now."""


class Queue:
    """The jobs of this process. All methods may be called from any thread."""

    def __init__(self, store: Store, worker: Worker, live: Live | None = None) -> None:
        self.live = live or Live()
        self._store, self._worker = store, worker
        self._lock = threading.RLock()
        self._entries = {entry.id: entry for entry in sorted(store.read(), key=lambda entry: (entry.order, entry.id))}
        self._problems: list[str] = []
        self._running: str | None = None
        self._control: Any = None
        self._going = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self.revision = 0

    # ---------------------------------------------------------------- asking

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong with the files of the queue, as sentences."""
        return (*self._store.problems, *self._problems)

    @property
    def going(self) -> bool:
        """Whether jobs that wait are started by themselves."""
        return self._going

    def running(self) -> Entry | None:
        """The job that runs."""
        with self._lock:
            return self._entries.get(self._running) if self._running else None

    def present(self) -> tuple[Entry | None, Facts | None]:
        """The job that runs, and what is known of it or of the last one (see `Live.facts`), of one moment."""
        with self._lock:
            return self.running(), self.live.facts()

    def waiting(self) -> tuple[Entry, ...]:
        """The jobs that wait, the next one first."""
        with self._lock:
            return tuple(entry for entry in self._entries.values() if entry.state == WAITING)

    def ended(self) -> tuple[Entry, ...]:
        """The jobs that are over, the latest first."""
        with self._lock:
            over = [entry for entry in self._entries.values() if entry.state in ENDED]
        return tuple(sorted(over, key=lambda entry: entry.ended or entry.started, reverse=True))

    def resume_offer(self) -> tuple[Entry, ...]:
        """Jobs that were running when their process ended, and that can go on."""
        return tuple(entry for entry in self.ended() if entry.state == INTERRUPTED and self.can_resume(entry))

    def can_resume(self, entry: Entry) -> bool:
        """Whether a job that is over can go on from its state."""
        over = entry.state in ENDED and entry.state != DONE
        return over and bool(entry.folder) and self._worker.can_resume(Path(entry.folder))

    def get(self, identity: str) -> Entry:
        """The entry with this id. Raises QueueError."""
        with self._lock:
            if identity not in self._entries:
                raise QueueError(f"There is no job {identity[:80]!r} in the queue; it may have been deleted meanwhile.")
            return self._entries[identity]

    def position(self, identity: str) -> int:
        """0 for the job that runs, 1 for the next one, and so on; -1 for one that is over."""
        with self._lock:
            if identity == self._running:
                return 0
            order = [entry.id for entry in self.waiting()]
            return order.index(identity) + 1 if identity in order else -1

    # ---------------------------------------------------------------- changing

    def add(self, job: Mapping[str, object]) -> Entry:
        """Put a job at the end of the queue; it is worked off when the queue is. Raises JobError for a name that is
        taken.
        """
        with self._lock:
            return self._enter(job, first=False)

    def start(self, job: Mapping[str, object]) -> Entry:
        """Start a job now, before those that wait; when one is running, put it at the end. Raises JobError."""
        with self._lock:
            entry = self._enter(job, first=self._running is None)
            self._go()
            return self._entries[entry.id]

    def go(self) -> None:
        """Work off what waits."""
        with self._lock:
            self._go()

    def hold(self) -> None:
        """Start nothing more after the job that runs."""
        with self._lock:
            self._going = False
            self.revision += 1

    def run_now(self, identity: str) -> Entry:
        """Make a waiting job the next one and work off the queue. Raises QueueError when it does not wait."""
        with self._lock:
            self._waiting(identity)
            self._reorder(identity, 0)
            self._go()
            return self._entries[identity]

    def move(self, identity: str, place: int) -> None:
        """Put a waiting job at another place, 0 is the next. Raises QueueError when it does not wait."""
        with self._lock:
            self._waiting(identity)
            self._reorder(identity, place)

    def delete(self, identity: str) -> None:
        """Take a job that does not run out of the list. Raises QueueError."""
        with self._lock:
            entry = self.get(identity)
            if entry.state == RUNNING:
                raise QueueError(f"{entry.name} is running. Stop it first.")
            self._store.remove(identity)
            del self._entries[identity]
            self.revision += 1

    def resume(self, identity: str) -> Entry:
        """Let a job that was stopped or interrupted go on, before those that wait. Raises QueueError when there is no
        state, JobError when its name is taken meanwhile.
        """
        with self._lock:
            entry = self.get(identity)
            if not self.can_resume(entry):
                raise QueueError(f"{entry.name} ({entry.state}) cannot go on: it has no state. Start it anew.")
            self._refuse_taken(entry.name)
            self._put(entry.replace(state=WAITING, resume=True, error=""))
            self._reorder(identity, 0)
            self._go()
            return self._entries[identity]

    def stop(self, *, save: bool = False, hold: bool = False) -> Entry:
        """End the running job after its step, with `save` with the file as it stands; the next one follows unless
        `hold`. Raises QueueError when none runs.
        """
        with self._lock:
            entry = self.running()
            if entry is None:
                raise QueueError("Nothing is running.")
            if hold:
                self._going = False
            self._control.stop(save=save)
            self.live.stopping()
            self.revision += 1
            return entry

    def close(self, timeout: float = 30.0) -> bool:
        """End the running job so that it can be resumed, start no other, and give the folder back. Returns whether it
        ended within `timeout` seconds.
        """
        with self._lock:
            self._going, self._closing = False, True
            if self._control is not None:
                self._control.stop()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        ended = thread is None or not thread.is_alive()
        if ended:
            self._store.close()
        return ended

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs; returns whether that came within `timeout` seconds."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    # ---------------------------------------------------------------- inside

    def _enter(self, job: Mapping[str, object], *, first: bool) -> Entry:
        entry = new_entry(job)
        self._refuse_taken(entry.name)
        orders = [held.order for held in self.waiting()]
        order = (min(orders, default=1) - 1) if first else (max(orders, default=-1) + 1)
        entry = entry.replace(order=order)
        self._put(entry)
        return entry

    def _refuse_taken(self, name: str) -> None:
        """Two jobs of one name would write one file. Names are compared as Windows compares them."""
        for held in self._entries.values():
            if held.state in (WAITING, RUNNING) and held.name.casefold() == name.casefold():
                where = "is running" if held.state == RUNNING else "waits in the queue"
                message = f"a job of this name {where}; choose another name."
                raise JobError([Problem("save_lora_name", "" if name == UNTITLED else name, message)])

    def _put(self, entry: Entry) -> None:
        self._store.put(entry)
        self._entries[entry.id] = entry
        self._sort()

    def _sort(self) -> None:
        ordered = sorted(self._entries.values(), key=lambda entry: (entry.order, entry.id))
        self._entries = {entry.id: entry for entry in ordered}
        self.revision += 1

    def _waiting(self, identity: str) -> Entry:
        entry = self.get(identity)
        if entry.state != WAITING:
            raise QueueError(f"{entry.name} does not wait in the queue ({entry.state}).")
        return entry

    def _reorder(self, identity: str, place: int) -> None:
        order = [entry for entry in self.waiting() if entry.id != identity]
        order.insert(max(0, min(place, len(order))), self._entries[identity])
        for number, entry in enumerate(order):
            if entry.order != number:
                self._put(entry.replace(order=number))
        self._sort()

    def _go(self) -> None:
        if self._closing:
            raise QueueError("The program is ending.")
        self._going = True
        if self._thread is not None:
            return
        if self._begin_next():  # here and not in the thread: whoever started it finds it running
            self._thread = threading.Thread(target=self._work, name="atelier-queue", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                entry, control = self._entries[str(self._running)], self._control
            ended = self._carry_out(entry, control)
            with self._lock:
                self._finish(ended)
                if not self._begin_next():
                    self._thread = None
                    return

    def _begin_next(self) -> bool:
        """Mark the next job as running; without one, or on hold, the queue rests."""
        waiting = self.waiting()
        if not self._going or not waiting:
            self._going = False
            return False
        entry = waiting[0].replace(state=RUNNING, started=time.time(), ended=0.0, error="")
        self._control = self._worker.control()
        self._running = entry.id
        self._keep(entry)
        self.live.begin(entry)
        return True

    def _carry_out(self, entry: Entry, control: Any) -> Entry:
        log = EventLog(self.live, self._follow)
        try:
            outcome = self._worker.run(entry, log, control)
        except AtelierError as error:
            return self._entries[entry.id].replace(state=FAILED, error=str(error))
        except BaseException as error:  # a defect must not end the thread with the rest of the queue
            traceback.print_exc()
            return self._entries[entry.id].replace(state=FAILED, error=f"{type(error).__name__}: {error}")
        state = _STATES.get(outcome.reason, DONE)
        if state == STOPPED and self._closing:
            state = INTERRUPTED
        known = self._entries[entry.id]
        return known.replace(state=state, path=outcome.path, folder=outcome.folder or known.folder)

    def _finish(self, entry: Entry) -> None:
        facts = self.live.facts()
        if facts is not None:
            entry = entry.replace(step=facts.step, total=facts.total)
        entry = entry.replace(ended=time.time())
        self._keep(entry)
        self._running = self._control = None
        for old in self.ended()[KEPT:]:
            del self._entries[old.id]
            with contextlib.suppress(AtelierError):  # then it is listed once more after the next start
                self._store.remove(old.id)
        self.live.end(entry)

    def _follow(self, event: Event) -> None:
        """What has to be on disk if the process dies now."""
        if isinstance(event, Opened) and self._running:
            with self._lock:
                self._keep(self._entries[self._running].replace(folder=event.folder))
        elif isinstance(event, Step) and self._running:
            with self._lock:
                entry = self._entries[self._running]
                self._entries[entry.id] = entry.replace(step=event.step, total=event.total)

    def _keep(self, entry: Entry) -> None:
        """Write an entry of a run; a full disk must not end the run itself."""
        self._entries[entry.id] = entry
        self._sort()
        try:
            self._store.put(entry)
        except AtelierError as fault:
            self._problems.append(str(fault))
