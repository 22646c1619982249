"""A long queue: what a change writes, who waits for a disk, and that no order of moves loses the order."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from random import Random

import pytest
from queue_case import job, make, names, step, until

import trainer.jobs.store as store_module
from trainer.jobs.entry import new_entry
from trainer.jobs.queue import Queue

LONG = 500


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a file was written and the disk asked to keep it."""
    counts = {"files": 0, "syncs": 0}
    real = store_module.write_json

    def write(path: Path, data: object) -> None:
        counts["files"] += 1
        real(path, data)

    monkeypatch.setattr(store_module, "write_json", write)
    monkeypatch.setattr(os, "fsync", lambda handle: counts.update(syncs=counts["syncs"] + 1))
    return counts


def long_queue(root: Path) -> tuple[Queue, list[str]]:
    """A queue of 500 as an earlier version left it: places without room between them."""
    folder = root / "queue"
    folder.mkdir()
    entries = [new_entry(job(f"j{number:03d}"), number) for number in range(LONG)]
    for entry in entries:
        (folder / f"{entry.id}.json").write_text(json.dumps({**entry.to_dict(), "order": int(entry.order)}))
    return make(root)[0], [entry.name for entry in entries]


def test_a_move_or_a_deletion_touches_one_file_however_many_wait(tmp_path: Path, written: dict[str, int]) -> None:
    queue, expected = long_queue(tmp_path)
    random = Random(3)
    for _ in range(150):
        entry = random.choice(queue.waiting())
        before = dict(written)
        expected.remove(entry.name)
        if random.random() < 0.3:
            queue.delete(entry.id)
        else:
            place = random.randrange(LONG)
            queue.move(entry.id, place)
            expected.insert(place, entry.name)
        assert written["files"] - before["files"] <= 1 and written["syncs"] - before["syncs"] <= 2
    assert names(queue.waiting()) == expected
    queue.close()
    again, _ = make(tmp_path)
    assert names(again.waiting()) == expected and not again.problems
    again.close()


def test_moves_to_one_place_without_end_keep_the_order(tmp_path: Path, written: dict[str, int]) -> None:
    queue, _ = make(tmp_path)
    expected = [f"j{number}" for number in range(8)]
    for name in expected:
        queue.add(job(name))
    for number in range(400):
        entry = queue.waiting()[3 + number % 5]
        expected.remove(entry.name)
        expected.insert(1, entry.name)
        queue.move(entry.id, 1)
        assert names(queue.waiting()) == expected
    assert written["files"] < 8 + 400 + 400 / 40 * 8, "only now and then there is no number left between two"
    queue.close()
    again, _ = make(tmp_path)
    assert names(again.waiting()) == expected
    again.close()


@pytest.mark.parametrize("fails_at", range(4))
def test_new_numbers_that_break_off_leave_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    close = [1.0, 1.0 + 2**-52, 1.0 + 2**-51, 5.0]  # nothing fits between the first two
    for name, order in zip("abcd", close, strict=True):
        entry = new_entry(job(name), order)
        (folder / f"{entry.id}.json").write_text(json.dumps(entry.to_dict()))
    queue, _ = make(tmp_path)
    real, count = store_module.write_json, iter(range(99))

    def write(path: Path, data: object) -> None:
        if next(count) == fails_at:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(store_module, "write_json", write)
    with pytest.raises(Exception, match="the disk is full"):
        queue.move(queue.waiting()[3].id, 1)
    order = names(queue.waiting())
    assert [name for name in order if name != "d"] == ["a", "b", "c"] and len(order) == 4
    queue.close()
    monkeypatch.undo()
    again, _ = make(tmp_path)
    assert names(again.waiting()) == order
    again.close()


def test_nobody_who_only_asks_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time over a move: status and the training's own steps go on meanwhile."""
    queue, gate = make(tmp_path)
    queue.start(job("runs"))
    until(lambda: gate.ran)
    waits = queue.add(job("a")), queue.add(job("b"))
    real, reached, go_on = store_module.write_json, threading.Event(), threading.Event()

    def slow(path: Path, data: object) -> None:
        reached.set()
        assert go_on.wait(60)
        real(path, data)

    monkeypatch.setattr(store_module, "write_json", slow)
    mover = threading.Thread(target=queue.move, args=(waits[1].id, 0))
    mover.start()
    assert reached.wait(60)
    seen: list[object] = []

    def asks() -> None:
        queue._follow(step(7))
        running, _ = queue.present()
        assert running is not None
        seen.extend((running.step, names(queue.snapshot().waiting), queue.resume_offer()))

    asker = threading.Thread(target=asks)
    asker.start()
    asker.join(30)
    assert not asker.is_alive() and seen == [7, ["a", "b"], ()]
    go_on.set()
    mover.join()
    assert names(queue.waiting()) == ["b", "a"]
    queue.stop(hold=True)
    assert queue.wait(60)
    queue.close()


def test_clear_takes_out_what_is_over_and_cannot_go_on(tmp_path: Path) -> None:
    queue, gate = make(tmp_path)
    done, stopped, later = (queue.add(job(name)) for name in ("done", "stopped", "later"))
    gate.let_go("done")
    queue.go()
    until(lambda: len(gate.ran) == 2)
    queue.stop(hold=True)
    assert queue.wait(60) and queue.get(done.id).state == "done"
    queue.clear(kept=[stopped.id])
    assert names(queue.ended()) == ["stopped"] and names(queue.waiting()) == ["later"]
    queue.close()
    again, _ = make(tmp_path)
    assert names(again.ended()) == ["stopped"] and names(again.waiting()) == ["later"]
    assert again.get(later.id).state == "waiting"
    again.close()
