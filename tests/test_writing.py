"""Files written whole or not at all, names that nobody else has, leftovers of the dead and drafts of the living."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import children
import pytest
from safetensors import SafetensorError

from trainer import lock, writing

ROOT = Path(__file__).resolve().parent.parent


def _without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # what FAT and many network drives answer

    monkeypatch.setattr(os, "link", refused)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_many_writers_of_one_name_get_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        _without_links(monkeypatch)
    target, got = tmp_path / "cat.safetensors", {}
    target.write_bytes(b"first")
    gate = threading.Barrier(12)

    def write(number: int) -> None:
        gate.wait()
        got[number] = writing.write_new(target, f"content {number}".encode())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == b"first"
    assert {path.name for path in got.values()} == {f"cat-{number}.safetensors" for number in range(1, 13)}
    assert all(path.read_bytes() == f"content {number}".encode() for number, path in got.items())
    assert len(os.listdir(tmp_path)) == 13


def test_the_same_bytes_are_not_written_twice(tmp_path: Path) -> None:
    assert [writing.write_new(tmp_path / "a.json", content).name for content in (b"1", b"2", b"1", b"2")] == [
        "a.json", "a-1.json", "a.json", "a-1.json"]  # fmt: skip


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for patched in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(os, patched, lambda *given: full(0))
            writing.write_whole(target, b"new")
        assert writing.why(caught.value) == "the disk is full"
        assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_goes_during_the_write_is_told_as_such(tmp_path: Path) -> None:
    def lose(file) -> None:
        for path in (tmp_path / "gone").iterdir():
            path.unlink()
        (tmp_path / "gone").rmdir()

    with pytest.raises(FileNotFoundError):
        writing.write_whole(tmp_path / "gone" / "a.json", lose)


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    """A process killed while it writes leaves its draft; the next one takes it away, but never that of a living one."""
    code = (
        "import sys, time; from pathlib import Path; from trainer import writing\n"
        "with writing.draft(Path(sys.argv[1])) as made:\n"
        "    made.file.write(b'half'); made.file.flush(); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cat.safetensors")]
    child = subprocess.Popen(command, cwd=ROOT, env=children.environment(), stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline().strip() == b"ready"
    download, older = tmp_path / "other.safetensors.tmp", tmp_path / ".dog.safetensors.4242.tmp"
    for path in (download, older):
        path.write_bytes(b"x")
    (left,) = (path for path in tmp_path.iterdir() if ".cat." in path.name)
    writing.sweep(tmp_path)
    assert left.exists() and download.exists() and not older.exists()
    child.send_signal(signal.SIGTERM)
    child.wait()
    child.stdout.close()
    writing.sweep(tmp_path)
    assert os.listdir(tmp_path) == [download.name]


@pytest.mark.skipif(os.name == "nt", reason="no open file is removed there")
def test_a_draft_that_is_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sweeps the folder between the making of the file and its lock."""
    hold, looked = lock.hold, []

    def first_of_another(file: IO[bytes], at: int = 0) -> bool | None:
        looked.append(Path(file.name))
        return hold(file, at) if len(looked) > 1 else None

    monkeypatch.setattr(lock, "hold", first_of_another)
    with writing.draft(tmp_path / "a") as made:
        assert made.path == looked[1] != looked[0]


@pytest.mark.skipif(os.name == "nt", reason="no open file is removed there")
def test_a_leftover_is_removed_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, held = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        with open(path, "r+b") as file:
            held.append(lock.hold(file, lock.BEHIND))
        unlink(path, missing_ok)

    (tmp_path / ".dog.safetensors.4242.tmp").write_bytes(b"x")
    monkeypatch.setattr(Path, "unlink", watched)
    writing.sweep(tmp_path)
    assert held == [None] and not os.listdir(tmp_path)


def test_reasons_are_words() -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert writing.why(full) == "the disk is full"
    assert writing.why(OSError(errno.EROFS, "Read-only file system")) == "the file system is read-only"
    assert writing.why(OSError(errno.EIO, "Input/output error")) == "Input/output error"


def test_a_lock_is_for_one_and_ends_with_its_process(tmp_path: Path) -> None:
    held = lock.take(tmp_path / "run.lock")
    assert held is not None and lock.take(tmp_path / "run.lock") is None
    held.release()
    again = lock.take(tmp_path / "run.lock")
    assert again is not None
    again.release()
