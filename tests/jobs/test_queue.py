"""The queue: order, one at a time, stops, failures, names, and what several threads do at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from queue_case import Gate, job, make, names, until

from trainer.errors import AtelierError, JobError
from trainer.jobs.listing import QueueError
from trainer.jobs.queue import Queue


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Queue, Gate]:
    monkeypatch.setattr("os.fsync", lambda handle: None)  # no test here cuts the power, and it takes seconds
    return make(tmp_path)


def test_the_second_start_gets_its_place_and_one_runs_at_a_time(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    first, second, third = (queue.start(job(name)) for name in ("a", "b", "c"))
    until(lambda: gate.ran)
    assert [queue.position(entry.id) for entry in (first, second, third)] == [0, 1, 2]
    assert queue.get(first.id).state == "running" and names(queue.waiting()) == ["b", "c"]
    for name in ("a", "b", "c"):
        gate.let_go(name)
    assert queue.wait(60)
    assert names(tuple(gate.ran)) == ["a", "b", "c"] and gate.most_at_once == 1
    assert [entry.state for entry in queue.ended()] == ["done"] * 3
    assert queue.get(second.id).path.endswith("b.safetensors") and queue.get(second.id).step == 10
    assert queue.position(first.id) == -1 and not queue.going


def test_adding_starts_nothing_and_start_goes_before_what_waits(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    queue.add(job("later"))
    queue.add(job("last"))
    assert queue.running() is None and not gate.ran and not queue.going
    queue.start(job("now"))
    for name in ("later", "last", "now"):
        gate.let_go(name)
    assert queue.wait(60)
    assert names(tuple(gate.ran)) == ["now", "later", "last"]


def test_a_name_is_taken_while_its_job_waits_or_runs(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    queue.start(job("Same"))
    queue.add(job("other"))
    queue.add(job(""))
    until(lambda: gate.ran)
    for name, where in (("same", "is running"), ("OTHER", "waits in the queue"), ("", "waits"), ("untitled", "waits")):
        for enter in (queue.add, queue.start):
            with pytest.raises(JobError, match=where) as caught:
                enter(job(name))
            assert [problem.field for problem in caught.value.problems] == ["save_lora_name"]
    gate.let_go("Same")
    until(lambda: names(queue.ended()) == ["Same"])
    assert names(queue.waiting()) != ["Same"]
    queue.add(job("same"))  # what is over no longer holds its name
    assert queue.stop(hold=True)
    assert queue.wait(60)


def test_a_failure_is_told_and_the_next_job_runs(pair: tuple[Queue, Gate], capsys: pytest.CaptureFixture[str]) -> None:
    queue, gate = pair
    gate.fails = {
        "a": AtelierError("the folder is empty"),
        "b": ZeroDivisionError("a defect"),
        "c": SystemExit(3),
        "d": MemoryError(),
    }
    entries = [queue.add(job(name)) for name in "abcde"]
    for name in "abcde":
        gate.let_go(name)
    queue.go()
    assert queue.wait(60)
    ended = [queue.get(entry.id) for entry in entries]
    assert [entry.state for entry in ended] == ["failed"] * 4 + ["done"]
    assert [entry.error for entry in ended[:3]] == [
        "the folder is empty", "ZeroDivisionError: a defect", "SystemExit: 3"
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "the folder is empty" not in told, "only defects get a traceback"
    assert next(line["text"] for line in queue.live.lines() if line["level"] == "error") == "the folder is empty"


def test_stop_goes_on_with_the_next_and_hold_does_not(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    with pytest.raises(QueueError, match="Nothing is running"):
        queue.stop()
    a, b, c = (queue.start(job(name)) for name in "abc")
    until(lambda: queue.position(a.id) == 0 and gate.ran)
    queue.stop()
    until(lambda: queue.position(b.id) == 0 and len(gate.ran) == 2)
    assert queue.get(a.id).state == "stopped" and queue.get(a.id).path == ""
    queue.stop(save=True, hold=True)
    assert queue.wait(60)
    assert queue.get(b.id).state == "saved_early" and queue.get(b.id).path.endswith("b.safetensors")
    assert queue.get(c.id).state == "waiting" and queue.position(c.id) == 1
    gate.let_go("c")
    queue.go()
    assert queue.wait(60) and queue.get(c.id).state == "done"


def test_hold_lets_the_running_job_end(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    a, b = queue.start(job("a")), queue.start(job("b"))
    queue.hold()
    gate.let_go("a")
    assert queue.wait(60)
    assert (queue.get(a.id).state, queue.get(b.id).state) == ("done", "waiting")


def test_reorder_delete_and_run_now(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    a, b, c, d = (queue.add(job(name)) for name in "abcd")
    queue.move(d.id, 0)
    assert names(queue.waiting()) == ["d", "a", "b", "c"]
    queue.move(d.id, 99)
    queue.move(a.id, -5)
    assert names(queue.waiting()) == ["a", "b", "c", "d"]
    queue.delete(b.id)
    assert names(queue.waiting()) == ["a", "c", "d"]
    for gone in (b.id, "no such id", "../../x"):
        for act in (queue.delete, queue.run_now, queue.resume, lambda one: queue.move(one, 0)):
            with pytest.raises(QueueError, match="no job"):
                act(gone)
    queue.run_now(d.id)
    until(lambda: queue.position(d.id) == 0)
    for act in (queue.delete, queue.run_now, lambda one: queue.move(one, 0)):
        with pytest.raises(QueueError):
            act(d.id)
    queue.run_now(c.id)  # one at a time: it becomes the next
    assert names(queue.waiting()) == ["c", "a"]
    for name in "acd":
        gate.let_go(name)
    assert queue.wait(60) and names(tuple(gate.ran)) == ["d", "c", "a"]
    queue.delete(a.id)
    assert names(queue.ended()) == ["c", "d"]


def test_a_stopped_job_goes_on_from_its_folder(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    a = queue.start(job("a"))
    until(lambda: gate.ran)
    queue.stop()
    assert queue.wait(60)
    folder = queue.get(a.id).folder
    assert Path(folder).is_dir() and queue.resume_offer() == () and queue.can_resume(queue.get(a.id))
    gate.let_go("a")
    assert queue.resume(a.id).resume
    assert queue.wait(60)
    assert gate.ran[1].resume and gate.ran[1].folder == folder and queue.get(a.id).state == "done"
    with pytest.raises(QueueError, match="cannot be resumed"):
        queue.resume(a.id)


def test_a_job_without_a_state_or_whose_name_is_taken_cannot_go_on(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    a = queue.start(job("a"))
    until(lambda: gate.ran)
    queue.stop()
    assert queue.wait(60)
    b = queue.add(job("A"))
    with pytest.raises(JobError, match="waits in the queue"):
        queue.resume(a.id)
    queue.delete(b.id)
    (Path(queue.get(a.id).folder) / "state").unlink()
    with pytest.raises(QueueError, match="has no saved state"):
        queue.resume(a.id)


def test_starts_from_many_threads_lose_and_double_nothing(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    wanted = [f"job{number}" for number in range(16)]
    for name in wanted:
        gate.let_go(name)
    barrier = threading.Barrier(8)

    def click(mine: list[str]) -> None:
        barrier.wait()
        for name in mine:
            queue.start(job(name))

    threads = [threading.Thread(target=click, args=(wanted[number::8],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: queue.wait(60) and not queue.waiting() and queue.running() is None)
    assert sorted(names(tuple(gate.ran))) == sorted(wanted) and gate.most_at_once == 1


def test_one_name_from_many_threads_runs_once(pair: tuple[Queue, Gate]) -> None:
    queue, gate = pair
    barrier, refused = threading.Barrier(6), []

    def click() -> None:
        barrier.wait()
        try:
            queue.start(job("one"))
        except JobError as error:
            refused.append(error)

    threads = [threading.Thread(target=click) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    gate.let_go("one")
    assert queue.wait(60) and len(gate.ran) == 1


def test_only_the_latest_that_are_over_stay_listed(
    pair: tuple[Queue, Gate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, gate = pair
    monkeypatch.setattr("trainer.jobs.listing.KEPT", 5)
    count = 5 + 3
    for number in range(count):
        gate.let_go(f"j{number}")
        queue.add(job(f"j{number}"))
    queue.go()
    assert queue.wait(20)
    assert names(queue.ended()) == [f"j{number}" for number in reversed(range(3, count))]
    assert len(list((tmp_path / "queue").glob("*.json"))) == 5


def test_closing_ends_the_run_so_that_it_is_offered_again(tmp_path: Path) -> None:
    queue, gate = make(tmp_path)
    a, b = queue.start(job("a")), queue.start(job("b"))
    until(lambda: gate.ran)
    assert queue.close(60)
    assert names(tuple(gate.ran)) == ["a"]
    for asked in (queue.go, lambda: queue.start(job("c")), lambda: queue.run_now(b.id), lambda: queue.resume(a.id)):
        with pytest.raises(QueueError, match="ending"):
            asked()
    again, _ = make(tmp_path, gate)
    assert names(again.resume_offer()) == ["a"] and names(again.waiting()) == ["b"]
    assert (again.get(a.id).state, again.position(b.id), again.going) == ("interrupted", 1, False)
