"""The list of jobs: their order, their names, what is over, each change on disk before it is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import AtelierError, JobError, Problem
from .entry import ENDED, RUNNING, UNTITLED, WAITING, Entry, new_entry
from .store import Store

KEPT = 50
"""Entries that are over and stay listed."""


class QueueError(AtelierError):
    """Something that cannot be done with the queue as it is now."""


class UnknownJobError(QueueError):
    """An id that no job of the queue has."""


@dataclass(frozen=True)
class Snapshot:
    """All entries at one moment, in the order in which they will run, and the revision that belongs to them."""

    entries: tuple[Entry, ...]
    revision: int

    @property
    def running(self) -> Entry | None:
        """The job that runs."""
        return next((entry for entry in self.entries if entry.state == RUNNING), None)

    @property
    def waiting(self) -> tuple[Entry, ...]:
        """The jobs that wait, the next one first."""
        return tuple(entry for entry in self.entries if entry.state == WAITING)

    @property
    def ended(self) -> tuple[Entry, ...]:
        """The jobs that are over, the latest first."""
        over = [entry for entry in self.entries if entry.state in ENDED]
        return tuple(sorted(over, key=lambda entry: entry.ended or entry.started, reverse=True))


class Listing:
    """Jobs in the order they will run, one file each in a store. All methods may be called from any thread.

    Two locks: `_lock` orders the changes and is held while one is written to the disk; `_shown` guards what is seen and
    is never held for longer than a moment. A change is written first and shown then. `snapshot` and what is made from
    it never wait for a disk; the other questions wait for a change that is on its way.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock, self._shown = threading.RLock(), threading.Lock()
        self._entries = {entry.id: entry for entry in sorted(store.read(), key=_order_of)}
        self._problems: list[str] = []
        self._revision = 0

    # ---------------------------------------------------------------- asking

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong with the files of the queue, as sentences."""
        return (*self._store.problems, *self._problems)

    @property
    def revision(self) -> int:
        """A number that changes with the queue."""
        return self._revision

    def snapshot(self) -> Snapshot:
        """All entries at this moment."""
        with self._shown:
            return Snapshot(tuple(self._entries.values()), self._revision)

    def running(self) -> Entry | None:
        """The job that runs."""
        with self._lock:
            return self.snapshot().running

    def waiting(self) -> tuple[Entry, ...]:
        """The jobs that wait, the next one first."""
        with self._lock:
            return self.snapshot().waiting

    def ended(self) -> tuple[Entry, ...]:
        """The jobs that are over, the latest first."""
        with self._lock:
            return self.snapshot().ended

    def get(self, identity: str) -> Entry:
        """The entry with this id. Raises UnknownJobError."""
        with self._lock, self._shown:
            if identity not in self._entries:
                message = f"There is no job {identity[:80]!r} in the queue; it may have been deleted meanwhile."
                raise UnknownJobError(message)
            return self._entries[identity]

    def position(self, identity: str) -> int:
        """0 for the job that runs, 1 for the next one, and so on; -1 for one that is over."""
        with self._lock:
            now = self.snapshot()
        order = [entry.id for entry in now.waiting]
        if now.running is not None and identity == now.running.id:
            return 0
        return order.index(identity) + 1 if identity in order else -1

    # ---------------------------------------------------------------- changing

    def add(self, job: Mapping[str, object], *, first: bool = False) -> Entry:
        """Put a job at the end of those that wait, or before them. Raises JobError for a name that is taken."""
        with self._lock:
            entry = new_entry(job)
            self._refuse_taken(entry.name)
            return self._place(entry, 0 if first else len(self._entries))

    def move(self, identity: str, place: int) -> None:
        """Put a waiting job at another place, 0 is the next. Raises QueueError when it does not wait."""
        with self._lock:
            entry = self.get(identity)
            if entry.state != WAITING:
                raise QueueError(f"{entry.name} does not wait in the queue ({entry.state}).")
            self._place(entry, place)

    def delete(self, identity: str) -> None:
        """Take a job that does not run out of the list. Raises QueueError."""
        with self._lock:
            entry = self.get(identity)
            if entry.state == RUNNING:
                raise QueueError(f"{entry.name} is running. Stop it first.")
            self._store.remove(identity)
            self._show(without=[identity])

    def clear(self, kept: Iterable[str]) -> None:
        """Take the jobs that are over out of the list, but for those whose id is among `kept`. Raises AtelierError when
        a file cannot be deleted.
        """
        with self._lock:
            left = set(kept)
            for entry in self.ended():
                if entry.id not in left:
                    self.delete(entry.id)

    # ---------------------------------------------------------------- for whoever runs them

    def _again(self, entry: Entry) -> None:
        """Let a job that is over wait once more, before the others, to go on. Raises JobError for a taken name."""
        self._refuse_taken(entry.name)
        self._place(entry.replace(state=WAITING, resume=True, error=""), 0)

    def _write(self, entry: Entry) -> None:
        """Write an entry of a run, which is not shown yet; a full disk must not end the run itself."""
        try:
            self._store.put(entry)
        except AtelierError as fault:
            self._problems.append(str(fault))

    def _forget_old(self) -> None:
        old = [entry.id for entry in self.ended()[KEPT:]]
        self._show(without=old)
        for identity in old:
            with contextlib.suppress(AtelierError):  # then it is listed once more after the next start
                self._store.remove(identity)

    # ---------------------------------------------------------------- inside

    def _refuse_taken(self, name: str) -> None:
        """Two jobs of one name would write one file. Names are compared as Windows compares them."""
        for held in self._entries.values():
            if held.state in (WAITING, RUNNING) and held.name.casefold() == name.casefold():
                where = "is running" if held.state == RUNNING else "waits in the queue"
                message = f"a job of this name {where}; choose another name."
                raise JobError([Problem("save_lora_name", "" if name == UNTITLED else name, message)])

    def _place(self, entry: Entry, place: int) -> Entry:
        """Put an entry that waits at a place among the others, with one write unless there is no number between its
        neighbours' any more.
        """
        others = [held for held in self.waiting() if held.id != entry.id]
        place = max(0, min(place, len(others)))
        before, after = others[place - 1 : place], others[place : place + 1]
        order = _between(before[0].order if before else None, after[0].order if after else None)
        if order is not None:
            return self._put(entry.replace(order=order))
        others.insert(place, entry)
        first = min(held.order for held in others) - len(others)
        # From the front: whenever this breaks off, those that were written come before the rest, in the right order.
        placed = [self._put(held.replace(order=first + number)) for number, held in enumerate(others)]
        return placed[place]

    def _put(self, entry: Entry) -> Entry:
        self._store.put(entry)
        self._show(entry)
        return entry

    def _show(self, *entries: Entry, without: Iterable[str] = ()) -> None:
        """Let everybody see entries as they are now, and no longer those without."""
        with self._shown:
            self._exchange(*entries, without=without)

    def _exchange(self, *entries: Entry, without: Iterable[str] = ()) -> None:
        """What `_show` does, for who holds `_shown`."""
        held = {**self._entries, **{entry.id: entry for entry in entries}}
        for identity in without:
            held.pop(identity, None)
        self._entries = {entry.id: entry for entry in sorted(held.values(), key=_order_of)}
        self._revision += 1


def _between(before: float | None, after: float | None) -> float | None:
    """A number between two; None when there is none left."""
    if before is None or after is None:
        return 0.0 if before is after else after - 1 if after is not None else (before or 0.0) + 1
    middle = before + (after - before) / 2
    return middle if before < middle < after else None


def _order_of(entry: Entry) -> tuple[float, str]:
    return entry.order, entry.id
