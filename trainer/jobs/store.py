"""The queue on disk: one JSON file per entry, each written whole or not at all, in a folder that one process owns.

Several WebUIs may run from one installation. Each process works in a folder of its own (`queue`, `queue-2`, …), held by
a lock that the system releases when the process ends however it ends. Entries in folders without an owner move to the
next process that starts, so that nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import AtelierError, JobError
from ..lock import Lock, take
from ..params.files import read_json, write_json
from ..writing import sweep, why
from .entry import IDENTITY, INTERRUPTED, RUNNING, BadEntryError, Entry, read_entry

LOCK = "owner.lock"
MOST_OWNERS = 16
DAMAGED = ".damaged"


class Store:
    """The entries of one queue folder, held by this process until `close`. Made by `open_store`."""

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder = folder
        self._lock = lock
        self._problems: list[str] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read or written since the store was opened, as sentences."""
        return tuple(self._problems)

    def read(self) -> list[Entry]:
        """All entries. A file that is not whole is set aside under another ending and never becomes an entry; a job
        that was running is one whose process has died, and comes back as interrupted.
        """
        sweep(self.folder, all_ours=True)
        found = [entry for path in sorted(self.folder.glob("*.json")) if (entry := self._read(path)) is not None]
        return [self._wake(entry) for entry in found]

    def put(self, entry: Entry) -> None:
        """Write an entry in place of the one with its id. Raises AtelierError when it cannot be written."""
        try:
            write_json(self._path(entry.id), entry.to_dict())
            _sync(self.folder)
        except OSError as fault:
            message = f"The queue cannot be written to {self.folder}: {why(fault)}. Make room or free the folder."
            raise AtelierError(message) from fault

    def remove(self, identity: str) -> None:
        """Delete an entry. Raises AtelierError when its file cannot be deleted."""
        try:
            self._path(identity).unlink(missing_ok=True)
            _sync(self.folder)
        except OSError as fault:
            raise AtelierError(f"{identity}.json in {self.folder} cannot be deleted: {why(fault)}.") from fault

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def adopt(self, other: Store) -> None:
        """Take over the entries of a folder that has no other owner."""
        try:
            for entry in other.read():
                self.put(entry)
                other.remove(entry.id)
        except AtelierError as fault:  # what was not moved stays where it is
            self._problems.append(str(fault))
        self._problems.extend(other.problems)

    def _path(self, identity: str) -> Path:
        if not IDENTITY.fullmatch(identity):
            raise AtelierError(f"{identity[:80]!r} is no entry of the queue.")
        return self.folder / f"{identity}.json"

    def _read(self, path: Path) -> Entry | None:
        try:
            return read_entry(read_json(path), path.stem)
        except (JobError, BadEntryError) as fault:
            if isinstance(fault.__cause__, OSError):
                self._problems.append(f"{path.name} in the queue cannot be read: {why(fault.__cause__)}.")
                return None
            aside = path.with_name(path.name + DAMAGED)
            with contextlib.suppress(OSError):
                os.replace(path, aside)
            self._problems.append(f"{path.name} in the queue is damaged ({fault}) and was set aside as {aside.name}.")
            return None

    def _wake(self, entry: Entry) -> Entry:
        if entry.state != RUNNING:
            return entry
        woken = entry.replace(state=INTERRUPTED)
        try:
            self.put(woken)
        except AtelierError as fault:  # it is offered all the same; the next start reads the same file again
            self._problems.append(str(fault))
        return woken


def open_store(folder: Path) -> Store:
    """The queue in `folder`, or beside it when another process owns that one, with the entries of folders beside it
    that nobody owns. Raises AtelierError when it cannot be kept there.
    """
    own: Store | None = None
    for candidate in _candidates(folder):
        if own is not None and not candidate.is_dir():
            continue
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            lock = take(candidate / LOCK)
        except OSError as fault:
            if own is not None:
                continue
            message = f"The queue cannot be kept in {candidate}: {why(fault)}. Free the folder."
            raise AtelierError(message) from fault
        if lock is None:
            continue
        if own is None:
            own = Store(candidate, lock)
        else:
            if lock.sure:
                own.adopt(Store(candidate, lock))
            lock.release()
    if own is None:
        raise AtelierError(f"{MOST_OWNERS} processes already keep a queue beside {folder}. End one of them.")
    return own


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    for number in range(2, MOST_OWNERS + 1):
        yield folder.with_name(f"{folder.name}-{number}")


def _sync(folder: Path) -> None:
    """Make the name of a new file survive a power cut, where the system has a way to ask for it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)
