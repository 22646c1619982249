"""Which process owns a file or a folder: a lock that the system releases however the process ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
BEHIND = 2**31 - 2
"""Where to lock a file that has contents: on Windows a locked byte cannot be read or written by others."""


class Lock:
    """A lock that is held until `release`. `sure` is false on a file system that knows no locks."""

    def __init__(self, file: IO[bytes], sure: bool) -> None:
        self._file = file
        self.sure = sure

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        self._file.close()


def take(path: Path) -> Lock | None:
    """The lock of a file, which is made; None when somebody holds it. Raises OSError when it cannot be made."""
    file = open(path, "ab")  # noqa: SIM115 (the open file is the lock)
    try:
        sure = hold(file)
    except OSError:
        file.close()
        raise
    if sure is None:
        file.close()
        return None
    return Lock(file, sure)


def hold(file: IO[bytes], at: int = 0) -> bool | None:
    """Lock an open file at byte `at` for as long as it is open; None when somebody holds it, False on a file system
    that knows no locks. Raises OSError.
    """
    try:
        _lock(file, at)
    except OSError as fault:
        if fault.errno in _UNSUPPORTED:
            return False
        if fault.errno in _HELD:
            return None
        raise
    return True


if os.name == "nt":
    import msvcrt

    def _lock(file: IO[bytes], at: int) -> None:
        place = file.tell()
        file.seek(at)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        finally:
            file.seek(place)

else:
    import fcntl

    def _lock(file: IO[bytes], at: int) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
