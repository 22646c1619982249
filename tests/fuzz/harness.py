"""Trying one input after another: what came of it, how long it took, what memory, what it wrote and started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from trainer.errors import AtelierError

MOST_SECONDS, MOST_MEMORY = 5.0, 500 * 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "os.startfile")
_CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Reader(Protocol):
    """One kind of input. `cost`: how many seconds one takes, roughly, so that counts can be shared out."""

    name: str
    cost: float

    def make(self, rng: Random) -> Callable[[], object]:
        """Prepare an input; what comes back reads it. The reading is what is watched."""


class Refused(Exception):
    """What a reader raises when its program said no in another way than by an AtelierError."""


class Hang(BaseException):
    """Computing took longer than it may."""


@dataclass
class Tally:
    """What became of the inputs of one reader; `failures`: kind, number of the input, what was raised."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    most: int = 0


class Watch:
    """An audit hook that notes programs that are started and files that are changed outside a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.on = str(folder.resolve()), list[str](), False
        allowed = (self.folder, "/dev/null", "/proc/self/clear_refs", sys.prefix)
        self._allowed = tuple(os.path.realpath(path) for path in allowed)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _PROGRAMS:
            self.seen.append(f"{event} {given[:2]!r:.200}")
        elif event == "open":
            path, _, flags = given
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._changes(path)
        elif event in _CHANGES:
            self._changes(given[0])

    def _changes(self, path: object) -> None:
        if isinstance(path, (str, bytes)):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(self._allowed) and "__pycache__" not in real and "matplotlib" not in real:
                self.seen.append(f"writes {real[:200]}")


def tried(reader: Reader, rng: Random, watch: Watch) -> tuple[str, str, float, int]:
    """(what came of an input, what was raised, seconds of computing, bytes beyond those before)."""
    read = reader.make(rng)
    watch.seen.clear()
    before = _memory(reset=True)
    began = time.process_time()
    kind, told = "accepted", ""
    try:
        with _clock(), _watching(watch):
            read()
    except (AtelierError, Refused):
        kind = "refused"
    except Hang:
        kind, told = "hang", f"more than {MOST_SECONDS} s"
    except Exception:
        kind, told = "traceback", traceback.format_exc()
    seconds, more = time.process_time() - began, _memory() - before
    if seconds > MOST_SECONDS:
        kind, told = "hang", f"{seconds:.1f} s. {told}"
    elif more > MOST_MEMORY:
        kind, told = "memory", f"{more / 2**20:.0f} MB. {told}"
    if watch.seen:
        kind, told = "outside", "; ".join(watch.seen[:3])
    return kind, told, seconds, more


def run(reader: Reader, seed: int, numbers: Iterator[int] | range, watch: Watch) -> Tally:
    """Try the inputs of these numbers; each depends on seed, reader and number alone."""
    tally = Tally()
    for number in numbers:
        kind, told, seconds, more = tried(reader, Random(f"{seed}/{reader.name}/{number}"), watch)
        tally.counts[kind] += 1
        tally.seconds += seconds
        tally.slowest, tally.most = max(tally.slowest, seconds), max(tally.most, more)
        if kind not in ("accepted", "refused"):
            tally.failures.append((kind, number, told))
    return tally


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder that everything is written in; temporary files of libraries too."""
    with tempfile.TemporaryDirectory() as name:
        before = tempfile.tempdir
        tempfile.tempdir = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _watching(watch: Watch) -> Iterator[None]:
    watch.on = True
    try:
        yield
    finally:
        watch.on = False


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    """Raise Hang in the middle of what takes too long, where the system can."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, 2 * MOST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 20 * MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def _memory(reset: bool = False) -> int:
    """Bytes of this process: now when the mark is reset, else the most since then; 0 where the system does not tell."""
    try:
        if reset:
            _RESET.write_text("5")
        text = _STATUS.read_text()
    except OSError:
        return 0
    name = "VmRSS:" if reset else "VmHWM:"
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name)), 0)
