"""The list of jobs: their order, their names, what is over, each change on disk before it is told."""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

from ..errors import AtelierError, JobError, Problem
from .entry import ENDED, RUNNING, UNTITLED, WAITING, Entry, new_entry
from .store import Store

KEPT = 50
"""Entries that are over and stay listed."""


class QueueError(AtelierError):
    """Something that cannot be done with the queue as it is now."""


class UnknownJobError(QueueError):
    """An id that no job of the queue has."""


class Listing:
    """Jobs in the order they will run, one file each in a store. All methods may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._entries = {entry.id: entry for entry in sorted(store.read(), key=_place)}
        self._problems: list[str] = []
        self.revision = 0

    # ---------------------------------------------------------------- asking

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong with the files of the queue, as sentences."""
        return (*self._store.problems, *self._problems)

    def running(self) -> Entry | None:
        """The job that runs."""
        with self._lock:
            return next((entry for entry in self._entries.values() if entry.state == RUNNING), None)

    def waiting(self) -> tuple[Entry, ...]:
        """The jobs that wait, the next one first."""
        with self._lock:
            return tuple(entry for entry in self._entries.values() if entry.state == WAITING)

    def ended(self) -> tuple[Entry, ...]:
        """The jobs that are over, the latest first."""
        with self._lock:
            over = [entry for entry in self._entries.values() if entry.state in ENDED]
        return tuple(sorted(over, key=lambda entry: entry.ended or entry.started, reverse=True))

    def get(self, identity: str) -> Entry:
        """The entry with this id. Raises UnknownJobError."""
        with self._lock:
            if identity not in self._entries:
                message = f"There is no job {identity[:80]!r} in the queue; it may have been deleted meanwhile."
                raise UnknownJobError(message)
            return self._entries[identity]

    def position(self, identity: str) -> int:
        """0 for the job that runs, 1 for the next one, and so on; -1 for one that is over."""
        with self._lock:
            running = self.running()
            if running is not None and identity == running.id:
                return 0
            order = [entry.id for entry in self.waiting()]
            return order.index(identity) + 1 if identity in order else -1

    # ---------------------------------------------------------------- changing

    def add(self, job: Mapping[str, object], *, first: bool = False) -> Entry:
        """Put a job at the end of those that wait, or before them. Raises JobError for a name that is taken."""
        with self._lock:
            entry = new_entry(job)
            self._refuse_taken(entry.name)
            orders = [held.order for held in self.waiting()]
            order = (min(orders, default=1) - 1) if first else (max(orders, default=-1) + 1)
            return self._put(entry.replace(order=order))

    def move(self, identity: str, place: int) -> None:
        """Put a waiting job at another place, 0 is the next. Raises QueueError when it does not wait."""
        with self._lock:
            entry = self.get(identity)
            if entry.state != WAITING:
                raise QueueError(f"{entry.name} does not wait in the queue ({entry.state}).")
            self._reorder(entry, place)

    def delete(self, identity: str) -> None:
        """Take a job that does not run out of the list. Raises QueueError."""
        with self._lock:
            entry = self.get(identity)
            if entry.state == RUNNING:
                raise QueueError(f"{entry.name} is running. Stop it first.")
            self._store.remove(identity)
            del self._entries[identity]
            self.revision += 1

    # ---------------------------------------------------------------- for whoever runs them

    def _again(self, entry: Entry) -> None:
        """Let a job that is over wait once more, before the others, to go on. Raises JobError for a taken name."""
        self._refuse_taken(entry.name)
        self._reorder(self._put(entry.replace(state=WAITING, resume=True, error="")), 0)

    def _keep(self, entry: Entry) -> None:
        """Hold and write an entry of a run; a full disk must not end the run itself."""
        self._hold(entry)
        try:
            self._store.put(entry)
        except AtelierError as fault:
            self._problems.append(str(fault))

    def _forget_old(self) -> None:
        for old in self.ended()[KEPT:]:
            del self._entries[old.id]
            with contextlib.suppress(AtelierError):  # then it is listed once more after the next start
                self._store.remove(old.id)

    # ---------------------------------------------------------------- inside

    def _refuse_taken(self, name: str) -> None:
        """Two jobs of one name would write one file. Names are compared as Windows compares them."""
        for held in self._entries.values():
            if held.state in (WAITING, RUNNING) and held.name.casefold() == name.casefold():
                where = "is running" if held.state == RUNNING else "waits in the queue"
                message = f"a job of this name {where}; choose another name."
                raise JobError([Problem("save_lora_name", "" if name == UNTITLED else name, message)])

    def _reorder(self, moved: Entry, place: int) -> None:
        order = [entry for entry in self.waiting() if entry.id != moved.id]
        order.insert(max(0, min(place, len(order))), moved)
        for number, entry in enumerate(order):
            if entry.order != number:
                self._put(entry.replace(order=number))
        self.revision += 1

    def _put(self, entry: Entry) -> Entry:
        self._store.put(entry)
        return self._hold(entry)

    def _hold(self, entry: Entry) -> Entry:
        self._entries[entry.id] = entry
        self._entries = {held.id: held for held in sorted(self._entries.values(), key=_place)}
        self.revision += 1
        return entry


def _place(entry: Entry) -> tuple[int, str]:
    return entry.order, entry.id
