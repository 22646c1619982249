"""The folder of one run: made for it alone, held by one process, with the job in it."""

from __future__ import annotations

import contextlib
import shutil
from datetime import datetime
from pathlib import Path

from ..errors import TrainingError
from ..lock import Lock, take
from ..params.files import json_bytes
from ..params.job import Job
from ..places import Places
from ..writing import sweep, why, write_whole

JOB_FILE = "job.json"
LOCK_FILE = "run.lock"


class RunFolder:
    """A run folder that belongs to this process until `close`. Made by `new_folder` and `open_folder`."""

    def __init__(self, path: Path, lock: Lock, new: bool) -> None:
        self.path = path
        self._lock = lock
        self._unused = new
        self._job: Job | None = None

    def keep_job(self, job: Job) -> None:
        """Write the job into it, as a whole: a run that goes on needs the one it has. Raises TrainingError."""
        self._job, self._unused = job, False
        path, content = self.path / JOB_FILE, json_bytes(job.to_dict(full=True))
        try:
            if not (path.is_file() and path.read_bytes() == content):
                write_whole(path, content)
        except OSError as error:
            raise TrainingError(
                f"The run folder {self.path} cannot be written: {why(error)}. Make room or free the folder, then start "
                "again."
            ) from error

    def ensure(self) -> None:
        """Make the folder anew, with lock and job, when somebody removed it during the run. Raises OSError."""
        if not (self.path / LOCK_FILE).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = take(self.path / LOCK_FILE) or self._lock
        if self._job is not None and not (self.path / JOB_FILE).exists():
            write_whole(self.path / JOB_FILE, json_bytes(self._job.to_dict(full=True)))

    def close(self) -> None:
        """Give it back. One that a run was refused in leaves no trace."""
        self._lock.release()
        if self._unused:
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # the day has other runs
                self.path.parent.rmdir()


def new_folder(places: Places, name: str) -> RunFolder:
    """A run folder that nobody has: two runs of one name in one second get two. Raises TrainingError."""
    wanted = places.run_folder(name, datetime.now())
    try:
        path, number = wanted, 1
        while not _made(path):
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        return _held(path, new=True)
    except OSError as error:
        message = f"The run folder {wanted} cannot be made: {why(error)}. Make room or choose another folder of logs."
        raise TrainingError(message) from error


def open_folder(path: Path) -> RunFolder:
    """The folder of a run that goes on; what a killed process left of unfinished files is removed. Raises TrainingError
    when another process holds it.
    """
    try:
        held = _held(path, new=False)
    except OSError as error:
        message = (
            f"The run folder {path} cannot be written: {why(error)}. Free it; the run continues in its own folder."
        )
        raise TrainingError(message) from error
    for folder in (path, *path.glob("samples*/")):
        sweep(folder, all_ours=True)
    return held


def _made(path: Path) -> bool:
    for last in (False, False, True):
        try:
            path.mkdir(parents=True)
            return True
        except FileExistsError:
            if not path.is_dir():
                raise  # a file is where a folder of it should be
            return False
        except FileNotFoundError:  # somebody tried the folder above and removed it again
            if last:
                raise
    return True


def _held(path: Path, new: bool) -> RunFolder:
    lock = take(path / LOCK_FILE)
    if lock is None:
        raise TrainingError(
            f"The run in {path} is running in another process. Wait until it has ended, or stop it there."
        )
    return RunFolder(path, lock, new)
