"""Which process owns a folder: a lock on a file, released by the system however the process ends."""
from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


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
        _lock(file)
    except OSError as fault:
        if fault.errno in _UNSUPPORTED:
            return Lock(file, sure=False)
        file.close()
        if fault.errno in _HELD:
            return None
        raise
    return Lock(file, sure=True)


if os.name == "nt":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
