"""The queue: takes jobs from several threads, works them off one at a time in one thread of its own, and survives what
happens to them.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import AtelierError
from ..events import Event, EventLog, Opened, Step
from .entry import DONE, ENDED, FAILED, INTERRUPTED, RUNNING, SAVED, STOPPED, Entry
from .listing import Listing, QueueError
from .live import Facts, Live
from .store import Store

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


class Queue(Listing):
    """The jobs of this process, worked off one at a time. All methods may be called from any thread."""

    def __init__(self, store: Store, worker: Worker, live: Live | None = None) -> None:
        super().__init__(store)
        self.live = live or Live()
        self._worker = worker
        self._control: Any = None
        self._going = False
        self._closing = False
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- asking

    @property
    def going(self) -> bool:
        """Whether jobs that wait are started by themselves."""
        return self._going

    def present(self) -> tuple[Entry | None, Facts | None]:
        """The job that runs, and what is known of it or of the last one (see `Live.facts`), of one moment."""
        with self._shown:
            return self._running(), self.live.facts()

    def _running(self) -> Entry | None:
        """The job that runs, for who holds `_shown`."""
        return next((entry for entry in self._entries.values() if entry.state == RUNNING), None)

    def resume_offer(self) -> tuple[Entry, ...]:
        """Jobs that were running when their process ended, and that can go on."""
        over = self.snapshot().ended
        return tuple(entry for entry in over if entry.state == INTERRUPTED and self.can_resume(entry))

    def can_resume(self, entry: Entry, finished: bool = False) -> bool:
        """Whether a job that is over can go on from its state; one that is `finished` only with other settings."""
        over = entry.state in ENDED and (finished or entry.state != DONE)
        return over and bool(entry.folder) and self._worker.can_resume(Path(entry.folder))

    # ---------------------------------------------------------------- running

    def start(self, job: Mapping[str, object]) -> Entry:
        """Start a job now, before those that wait; when one is running, put it at the end. Raises JobError, and
        QueueError when the program is ending.
        """
        with self._lock:
            self._refuse_ending()
            entry = self.add(job, first=self.running() is None)
            self.go()
            return self.get(entry.id)

    def go(self) -> None:
        """Work off what waits. Raises QueueError when the program is ending."""
        with self._lock:
            self._refuse_ending()
            self._going = True
            if self._thread is None and self._begin_next():  # here: whoever started it finds it running
                self._thread = threading.Thread(target=self._work, name="atelier-queue", daemon=True)
                self._thread.start()

    def hold(self) -> None:
        """Start nothing more after the job that runs."""
        with self._lock:
            self._going = False
            self._show()

    def run_now(self, identity: str) -> Entry:
        """Make a waiting job the next one and work off the queue. Raises QueueError when it does not wait."""
        with self._lock:
            self._refuse_ending()
            self.move(identity, 0)
            self.go()
            return self.get(identity)

    def resume(self, identity: str, job: Mapping[str, object] | None = None) -> Entry:
        """Let a job that was stopped or interrupted go on, before those that wait; with the settings of a longer `job`
        also one that is finished. Raises QueueError when there is no state, JobError when its name is taken meanwhile.
        """
        with self._lock:
            self._refuse_ending()
            entry = self.get(identity)
            if not self.can_resume(entry, finished=job is not None):
                why = (
                    "it is finished; extend it"
                    if self.can_resume(entry, True)
                    else "it has no saved state. Start it again"
                )
                raise QueueError(f"{entry.name} ({entry.state}) cannot be resumed: {why}.")
            self._again(entry if job is None else entry.replace(job=dict(job)))
            self.go()
            return self.get(identity)

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
            self._show()
            return entry

    def close(self, timeout: float = 30.0) -> bool:
        """End the running job so that it can be resumed, start no other, and give the folder back. Returns whether it
        ended within `timeout` seconds.
        """
        with self._lock:
            self._going, self._closing = False, True
            if self._control is not None:
                self._control.stop()
        ended = self.wait(timeout)
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

    def _refuse_ending(self) -> None:
        """Before anything is changed: what is asked for now would not be done."""
        if self._closing:
            raise QueueError("The program is ending.")

    # ---------------------------------------------------------------- the thread

    def _begin_next(self) -> Entry | None:
        """Mark the next job as running; without one, or on hold, the queue rests."""
        waiting = self.waiting()
        if not self._going or not waiting:
            self._going = False
            return None
        entry = waiting[0].replace(state=RUNNING, started=time.time(), ended=0.0, error="")
        self._control = self._worker.control()
        self._write(entry)
        with self._shown:
            self._exchange(entry)
            self.live.begin(entry)
        return entry

    def _work(self) -> None:
        with self._lock:
            entry = self.running()
        while entry is not None:
            ended = self._carry_out(entry)
            with self._lock:
                self._finish(ended)
                entry = self._begin_next()
                if entry is None:
                    self._thread = None

    def _carry_out(self, entry: Entry) -> Entry:
        log = EventLog(self.live, self._follow)
        try:
            outcome = self._worker.run(entry, log, self._control)
        except AtelierError as error:
            return self.get(entry.id).replace(state=FAILED, error=str(error))
        except BaseException as error:  # a defect must not end the thread with the rest of the queue
            traceback.print_exc()
            return self.get(entry.id).replace(state=FAILED, error=f"{type(error).__name__}: {error}")
        state = _STATES.get(outcome.reason, DONE)
        if state == STOPPED and self._closing:
            state = INTERRUPTED
        known = self.get(entry.id)
        return known.replace(state=state, path=outcome.path, folder=outcome.folder or known.folder)

    def _finish(self, entry: Entry) -> None:
        facts = self.live.facts()
        if facts is not None:
            entry = entry.replace(step=facts.step, total=facts.total)
        entry = entry.replace(ended=time.time())
        self._write(entry)
        self._control = None
        with self._shown:
            self._exchange(entry)
            self.live.end(entry)
        self._forget_old()

    def _follow(self, event: Event) -> None:
        """What has to be on disk if the process dies now, and what is only shown."""
        if isinstance(event, Step):
            with self._shown:
                running = self._running()
                if running is not None:
                    self._entries[running.id] = running.replace(step=event.step, total=event.total)
        elif isinstance(event, Opened):
            with self._lock:
                entry = self.snapshot().running
                if entry is not None:
                    opened = entry.replace(folder=event.folder)
                    self._write(opened)
                    self._show(opened)
