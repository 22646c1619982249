"""What a running job tells: the curve stays small and right, log and events come piece by piece."""

from __future__ import annotations

import random
import time

from queue_case import job, step

from trainer.events import Note, Opened, Preflight, Sampled, Saved, Stage, Step
from trainer.jobs.curve import MOST_POINTS, Curve
from trainer.jobs.entry import new_entry
from trainer.jobs.live import Live


def test_a_short_curve_is_told_point_by_point() -> None:
    curve = Curve(5)
    for number in (1, 2, 3):
        curve.add(step(number, loss=number * 0.5))
    whole = curve.since(-1, 0)
    assert whole == {
        "revision": 5,
        "from": 0,
        "points": [[1, 0.5, 0.25, [1e-4]], [2, 1.0, 0.5, [1e-4]], [3, 1.5, 0.75, [1e-4]]],
    }
    assert curve.since(5, 2)["points"] == [[3, 1.5, 0.75, [1e-4]]]
    assert curve.since(5, 3)["points"] == []
    for wrong in ((4, 2), (5, 4), (5, -1)):
        assert curve.since(*wrong)["from"] == 0 and len(curve.since(*wrong)["points"]) == 3


def test_a_long_curve_keeps_the_mean_of_what_it_joins() -> None:
    rng = random.Random(1)
    losses = [rng.random() for _ in range(8 * MOST_POINTS + 137)]
    curve = Curve()
    for number, loss in enumerate(losses, 1):
        curve.add(Step(number, len(losses), loss, number / 2, (number * 1e-6,), 1.0, 1.0))
    told = curve.since(-1, 0)
    points = told["points"]
    assert MOST_POINTS / 2 <= len(points) < MOST_POINTS and told["revision"] == 4
    steps = [point[0] for point in points]
    assert steps == list(range(16, 16 * len(points) + 1, 16)), "1,000 points joined four times: 16 steps each"
    for end, loss, average, rates in points:
        expected = sum(losses[end - 16 : end]) / 16
        assert abs(loss - expected) < 1e-12 and average == end / 2 and rates == [end * 1e-6]


def test_a_caller_who_comes_back_gets_only_what_is_new() -> None:
    curve = Curve()
    held: list[list[object]] = []
    revision = -1
    for number in range(1, 2500):
        curve.add(step(number, 2500, loss=float(number)))
        if number % 7 == 0:
            told = curve.since(revision, len(held))
            held[int(str(told["from"])) :] = told["points"]
            revision = told["revision"]
    told = curve.since(revision, len(held))
    held[int(str(told["from"])) :] = told["points"]
    assert held == curve.since(-1, 0)["points"]


def test_the_facts_of_a_run() -> None:
    live = Live()
    assert live.facts() is None and live.lines() == [] and live.curve()["points"] == []
    live(Note("before any run"))
    entry = new_entry(job("a"))
    live.begin(entry)
    live(Preflight({"model": "demo"}))
    live(Opened("/logs/run"))
    live(Stage("encoding", 3, 12))
    facts = live.facts()
    assert facts is not None and facts.stage == Stage("encoding", 3, 12, at=facts.stage.at)
    live(Stage("encoding", 12, 12))
    live(Step(4, 10, 0.5, 0.25, (1e-4, 2e-4), 8.0, 3.0))
    live(Sampled(4, tuple(f"/logs/run/{number}.png" for number in range(20))))
    live(Saved("C:\\Lora\\a_4steps.safetensors", 4))
    facts = live.facts()
    assert facts is not None and facts.stage is None and facts.folder == "/logs/run"
    assert (facts.step, facts.total, facts.loss, facts.loss_ema, facts.rates) == (4, 10, 0.5, 0.25, (1e-4, 2e-4))
    assert facts.seconds_per_step == 0.5 and len(facts.samples) == 16 and facts.report == {"model": "demo"}
    live(Step(10, 10, 0.5, 0.25, (1e-4,), 8.0, 0.0))
    live.end(entry.replace(state="failed", error="the disk is full"))
    facts = live.facts()
    assert facts is not None and facts.ended and facts.seconds_per_step == 0.5, "the last pace stays"
    texts = [line["text"] for line in live.lines()]
    assert texts == [
        "before any run",
        "Generated 20 sample image(s) at step 4.",
        "Saved a_4steps.safetensors (step 4).",
        "the disk is full",
    ]
    assert [line["name"] for line in live.lines()] == ["", "a", "a", "a"]
    assert len({line["run"] for line in live.lines()}) == 2
    first = live.lines()[0]["seq"]
    assert [line["text"] for line in live.lines(after=int(str(first)))] == texts[1:]
    kinds = [event["event"] for event in live.events(int(str(first)))]
    assert kinds == ["began", "preflight", "opened", "stage", "stage", "step", "sampled", "saved", "step", "ended"]


def test_a_new_run_begins_a_new_curve() -> None:
    live = Live()
    live.begin(new_entry(job("a")))
    live(step(1))
    before = live.curve()
    live.begin(new_entry(job("b")))
    after = live.curve(int(str(before["revision"])), 1)
    assert after["points"] == [] and after["from"] == 0 and after["revision"] != before["revision"]


def test_numbers_rise_over_a_restart() -> None:
    old = Live()
    old.begin(new_entry(job("a")))
    time.sleep(0.01)
    new = Live()
    new.begin(new_entry(job("a")))
    last = int(str(old.events()[-1]["seq"]))
    assert new.events(last), "a page that stayed open sees what the restarted program tells"


def test_the_log_keeps_the_latest_lines() -> None:
    live = Live()
    for number in range(1000):
        live(Note(f"line {number}"))
    lines = live.lines()
    assert len(lines) == 300 and lines[-1]["text"] == "line 999" and lines[0]["text"] == "line 700"
