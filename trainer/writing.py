"""Files that are written whole or not at all, names that are taken without replacing anything, and what a crash left.

A file is written beside its place under a temporary name. While its writer lives, that file is locked, so that what
a killed process left behind can be told from what another one is writing at the moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from . import lock

_RETRIES, _PAUSE = 5, 0.2
_DAY, _MINUTE = 24 * 3600.0, 60.0
_TEMPORARY = re.compile(r"\..+\.(\d+|[a-z0-9_]{8}|\d+\.[0-9a-f]{8})\.tmp")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.EINVAL}
_WORDS = {
    errno.ENOSPC: "the disk is full",
    getattr(errno, "EDQUOT", -1): "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EFBIG: "the file is larger than this system allows",
}
_FULL_ON_WINDOWS = (39, 112)


def why(error: BaseException) -> str:
    """What went wrong with a file, in a few words, also for libraries that give the system's error as a text."""
    number = getattr(error, "errno", None)
    if getattr(error, "winerror", None) in _FULL_ON_WINDOWS:
        number = errno.ENOSPC
    if number is None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told.group(1)) if told else None
        if number in _FULL_ON_WINDOWS and os.name == "nt":
            number = errno.ENOSPC
    return _WORDS.get(number or 0) or getattr(error, "strerror", None) or str(error) or type(error).__name__


class Draft:
    """A file that is being written beside its place: `file` is open for writing, `path` its temporary name."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path, self.file, ours = self._open()
        for _ in range(_RETRIES):
            if ours:
                return
            self.file.close()  # somebody took it for a leftover before it was locked
            self.path, self.file, ours = self._open()

    def _open(self) -> tuple[Path, IO[bytes], bool]:
        """(temporary name, its open file, whether nobody removes it any more)."""
        stem = self._target.name.encode()[:100].decode(errors="ignore")
        path = self._target.with_name(f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        for last in (False, False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "x+b")  # noqa: SIM115 (held open, and with it the lock)
                break
            except FileNotFoundError:  # somebody who had made the folder to try it removes it again
                if last:
                    raise
        try:
            held = lock.hold(file, lock.BEHIND)
        except OSError:
            file.close()
            path.unlink()
            raise
        return path, file, os.name == "nt" or (held is not None and path.exists())  # there no open file is removed

    def finish(self) -> None:
        """Everything is written: bring it to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if os.name == "nt":  # an open file can be neither renamed nor replaced there
            self.file.close()


@contextlib.contextmanager
def draft(target: Path) -> Iterator[Draft]:
    """A draft of `target`, whose folder is made; what is still there at the end is removed. Raises OSError."""
    made = Draft(target)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):  # closing writes what is pending, and the folder may be gone
            made.file.close()
        with contextlib.suppress(OSError):
            made.path.unlink()


def write_whole(target: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file, in place of one that is there, so that it is either the old or the whole new one. Raises OSError.

    `content` are its bytes, or what writes them into an open file.
    """
    with draft(target) as made:
        if callable(content):
            content(made.file)
        else:
            made.file.write(content)
        made.finish()
        replace(made.path, target)


def write_new(target: Path, content: bytes, reuse: bool = True) -> Path:
    """Write a file under its name or, when that is taken, under the next free one; returns where. To `reuse` is a file
    of these bytes that is there already. Raises OSError.
    """
    for known in taken(target) if reuse else ():
        with contextlib.suppress(OSError):
            if known.stat().st_size == len(content) and known.read_bytes() == content:
                return known
    with draft(target) as made:
        made.file.write(content)
        made.finish()
        return claim(made.path, target)


def replace(source: Path, target: Path) -> None:
    """Move a finished file to its name. Raises OSError, one of permissions only after some time: on Windows a virus
    scanner may have the file open.
    """
    for attempt in range(_RETRIES, 0, -1):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if attempt == 1:
                raise
            time.sleep(_PAUSE)


def claim(source: Path, target: Path, first: int = 0) -> Path:
    """Move a finished file to its name, or to `<name>-1`, `-2`, … when that is taken; returns the name it got.

    `first`: the number to begin with, 0 for the name itself. Of several processes each gets a name of its own: the
    system gives the name or refuses it. Raises OSError.
    """
    for name in names(target, first):
        try:
            _take(source, name)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, "too many files of this name", str(target))


def names(target: Path, first: int = 0) -> Iterator[Path]:
    """The names a file may get, in order: the one that is wanted, and those with a number from 1 on."""
    for number in range(first, 10_000):
        yield target.with_name(f"{target.stem}-{number}{target.suffix}") if number else target


def taken(target: Path) -> Iterator[Path]:
    """Those of these names that are taken, up to the first free one."""
    for name in names(target):
        if not os.path.lexists(name):
            return
        yield name


def _take(source: Path, target: Path) -> None:
    """Give a file a name that nobody has. Raises FileExistsError when it is taken."""
    if os.name == "nt":
        os.rename(source, target)  # refuses a name that is taken there
        return
    try:
        os.link(source, target)
    except OSError as fault:
        if isinstance(fault, FileExistsError) or fault.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours from here on
        try:
            os.replace(source, target)
        except OSError:
            with contextlib.suppress(OSError):
                target.unlink()
            raise
    else:
        with contextlib.suppress(OSError):  # it has the new name; a second one does no harm
            source.unlink()


def sweep(folder: Path, *, all_ours: bool = False) -> None:
    """Remove the temporary files that killed processes left in a folder, never those of a living one.

    Only names that `draft` gives are touched; with `all_ours` everything that ends in .tmp, and what safetensors writes
    for the moment. What cannot be removed stays.
    """
    found = {*folder.glob("*.tmp"), *(folder.glob(".tmp*") if all_ours else ())}
    for path in sorted(found):
        if all_ours or _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                if path.is_file():
                    _remove_left(path)


def _remove_left(path: Path) -> None:
    """Remove a file that nobody writes any more; where that cannot be asked, its age decides. Raises OSError."""
    age = time.time() - path.stat().st_mtime
    with open(path, "r+b") as file:
        held = lock.hold(file, lock.BEHIND)
        if held is None or not (held or age > _DAY):
            return
        if os.name != "nt":
            path.unlink()  # while it is locked: its writer, if it has just made it, sees that it is gone
            return
    if age > _MINUTE:  # there a file is closed before it gets its name, and removed
        path.unlink()
