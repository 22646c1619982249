"""The queue on disk: what a dead process leaves behind, damaged files, several processes, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from children import environment
from queue_case import Gate, job, make, names, until

import trainer.jobs.store as store_module
from trainer.errors import AtelierError
from trainer.jobs.entry import BadEntryError, new_entry, read_entry
from trainer.jobs.queue import Queue
from trainer.jobs.store import DAMAGED, open_store

CHILD = """
import sys, time
from pathlib import Path
from queue_case import job, make
queue, gate = make(Path(sys.argv[1]))
queue.start(job("running"))
queue.add(job("waiting"))
while queue.running() is None or not queue.running().folder:
    time.sleep(0.002)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_process_leaves_a_queue_that_goes_on(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment(), stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        other = open_store(tmp_path / "queue")  # a second WebUI of the same installation
        assert other.folder.name == "queue-2" and other.read() == []
        other.close()
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    queue, gate = make(tmp_path)
    assert names(queue.resume_offer()) == ["running"] and names(queue.waiting()) == ["waiting"]
    assert queue.running() is None and not queue.going and not gate.ran, "nothing starts by itself"
    gate.let_go("running")
    gate.let_go("waiting")
    queue.resume(queue.resume_offer()[0].id)
    assert queue.wait(60)
    assert [(entry.name, entry.resume) for entry in gate.ran] == [("running", True), ("waiting", False)]
    queue.close()


def test_entries_survive_a_restart_in_their_order(tmp_path: Path) -> None:
    queue, _ = make(tmp_path)
    a, _, c = (queue.add(job(name, train_learning_rate=1e-4, note="ü 日本")) for name in "abc")
    queue.move(c.id, 0)
    queue.close()
    again, _ = make(tmp_path)
    assert names(again.waiting()) == ["c", "a", "b"]
    assert again.get(a.id) == queue.get(a.id) and again.get(a.id).job["note"] == "ü 日本"
    again.close()


@pytest.mark.parametrize("seed", range(6))
def test_after_every_operation_the_disk_says_what_memory_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whenever the power goes, the next start finds the same jobs in the same order and states."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    queue, gate = make(tmp_path)
    random, made = Random(seed), 0
    for number in range(40):
        waiting, running = list(queue.waiting()), queue.running()
        stopped = [entry for entry in queue.ended() if queue.can_resume(entry)]
        steps: list[Callable[[], object]] = [queue.hold]
        if len(waiting) < 5:
            made += 1
            name = f"job{made}"
            steps += [partial(random.choice((queue.add, queue.start)), job(name))] * 3
        if waiting:
            one = random.choice(waiting)
            steps += [partial(queue.move, one.id, random.randrange(6)), partial(queue.delete, one.id)]
            steps += [partial(queue.run_now, one.id), queue.go]
        if running:
            steps += [partial(queue.stop, save=random.random() < 0.5), partial(gate.let_go, running.name)]
        if stopped:
            steps += [partial(queue.resume, random.choice(stopped).id), partial(queue.delete, stopped[0].id)]
        random.choice(steps)()
        if random.random() < 0.5:
            time.sleep(0.005)
        same_on_disk(queue, tmp_path / f"copy{number}")
    assert made > 5 and len(gate.ran) > 3
    queue.close()


def same_on_disk(queue: Queue, copy: Path) -> None:
    """A queue opened on a copy of the files holds what `queue` holds; what runs is interrupted there."""
    with queue._lock:
        shutil.copytree(queue._store.folder, copy / "queue", ignore=shutil.ignore_patterns("*.lock"))
        held = {entry.id: entry for entry in (*queue.waiting(), *queue.ended())}
        order, running = names(queue.waiting()), queue.running()
    again, _ = make(copy)
    assert names(again.waiting()) == order and not again.problems
    found = {entry.id: entry for entry in (*again.waiting(), *again.ended())}
    if running is not None:
        assert found.pop(running.id).state == "interrupted"
    assert found == held
    again.close()


def whole(tmp_path: Path) -> Path:
    """The file of an entry that waits."""
    queue, _ = make(tmp_path)
    entry = queue.add(job("x"))
    queue.close()
    return tmp_path / "queue" / f"{entry.id}.json"


def test_a_file_cut_anywhere_is_never_an_entry(tmp_path: Path) -> None:
    path = whole(tmp_path)
    content = path.read_bytes()
    store = open_store(tmp_path / "queue")
    for count, length in enumerate((*range(0, 20), *range(20, len(content.rstrip()), 7), len(content.rstrip()) - 1), 1):
        path.write_bytes(content[:length])
        assert store.read() == [] and len(store.problems) == count and "set aside" in store.problems[-1]
        assert not path.exists() and path.with_name(path.name + DAMAGED).read_bytes() == content[:length]
    path.write_bytes(content)
    assert names(tuple(store.read())) == ["x"]
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"id": "0" * 16 + "-" + "0" * 8}, {"state": "executed"}, {"job": []}, {"job": {}},
        {"order": "1"}, {"resume": 1}, {"step": True}, {"started": None}, {"folder": ["x"]},
    ],
)  # fmt: skip
def test_an_entry_with_a_wrong_value_is_set_aside(tmp_path: Path, change: dict[str, object]) -> None:
    path = whole(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    store = open_store(tmp_path / "queue")
    assert store.read() == [] and len(store.problems) == 1
    store.close()


def test_foreign_files_and_left_over_halves(tmp_path: Path) -> None:
    path = whole(tmp_path)
    (path.parent / f".{path.stem}.abc.tmp").write_text("{")
    (path.parent / "notes.json").write_text(path.read_text())
    (path.parent / "readme.txt").write_text("mine")
    store = open_store(tmp_path / "queue")
    assert names(tuple(store.read())) == ["x"]
    assert sorted(found.name for found in path.parent.iterdir()) == sorted(
        ["notes.json" + DAMAGED, "owner.lock", path.name, "readme.txt"]
    )
    store.close()


def test_a_left_over_that_cannot_be_removed_does_not_stop_the_queue(tmp_path: Path, monkeypatch) -> None:
    """On Windows somebody, such as a virus scanner, may have it open."""
    path = whole(tmp_path)
    left = path.parent / f".{path.name}.1.0123abcd.tmp"
    left.write_text("{")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    store = open_store(tmp_path / "queue")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert names(tuple(store.read())) == ["x"] and left.exists()
    assert names(tuple(store.read())) == ["x"] and not left.exists()
    store.close()


def test_a_write_that_breaks_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, _ = make(tmp_path)
    a, b = queue.add(job("a")), queue.add(job("b"))

    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_json", full)
    for act in (lambda: queue.add(job("c")), lambda: queue.move(b.id, 0)):
        with pytest.raises(AtelierError, match=r"the disk is full.*Make room"):
            act()
    assert names(queue.waiting()) == ["a", "b"]
    queue.close()
    monkeypatch.undo()
    again, _ = make(tmp_path)
    assert names(again.waiting()) == ["a", "b"] and again.get(a.id).order < again.get(b.id).order
    again.close()


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, gate = make(tmp_path)
    a = queue.start(job("a"))
    until(lambda: gate.ran)

    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_json", full)
    gate.let_go("a")
    assert queue.wait(60) and queue.get(a.id).state == "done"
    assert any("the disk is full" in problem for problem in queue.problems)
    queue.close()


def test_a_folder_without_owner_is_taken_over(tmp_path: Path) -> None:
    first = open_store(tmp_path / "queue")
    second, _ = make(tmp_path)  # another process while the first lives
    second.add(job("from the second"))
    second.close()
    first.close()
    queue, _ = make(tmp_path)
    assert names(queue.waiting()) == ["from the second"]
    assert list((tmp_path / "queue-2").glob("*.json")) == []
    queue.close()


def test_what_belongs_to_a_living_process_is_left_alone(tmp_path: Path) -> None:
    first, second = open_store(tmp_path / "queue"), open_store(tmp_path / "queue")
    entry = new_entry(job("mine"))
    second.put(entry)
    first.close()
    third = open_store(tmp_path / "queue")
    assert third.folder.name == "queue" and third.read() == [] and names(tuple(second.read())) == ["mine"]
    third.close()
    second.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AtelierError, match="cannot be kept"):
        open_store(tmp_path / "file" / "queue")


def test_identities_are_new_and_in_order_of_time() -> None:
    made = [new_entry(job("x")).id for _ in range(3)]
    time.sleep(0.002)
    later = new_entry(job("x")).id
    assert len({*made, later}) == 4 and later > max(made)
    with pytest.raises(BadEntryError, match="no settings"):
        read_entry({**new_entry(job("x")).to_dict(), "job": None}, made[0])


def test_a_worker_cannot_change_what_is_kept(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    queue, _ = make(tmp_path, gate)
    settings = job("a")
    entry = queue.add(settings)
    settings["mode"] = "changed later"
    assert queue.get(entry.id).job["mode"] == "iLECO"
    queue.close()
