"""What is told of a run's cost before it starts is what the last one of its kind took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.engine.catalogue import catalogue
from trainer.engine.costs import Cost, CostWatch, known, plain, steps_of
from trainer.engine.preflight import MEMORY
from trainer.events import EventLog, Finished, Preflight, Step
from trainer.params.codec import load
from trainer.params.job import Job

CPU = torch.device("cpu")


def job(**more: object) -> Job:
    return load({"format": 1, "mode": "LoRA", "model": "/a/base.safetensors", **more}, catalogue(), complete=False).job


def told(watch: CostWatch, *steps: tuple[int, int, float], reason: str = "done", ready: float = 107.5) -> None:
    log = EventLog(watch)
    log.tell(Preflight({MEMORY: {"encoding images": 900, "training": 1234}}, at=ready))
    for step, total, at in steps:
        log.tell(Step(step, total, 0.1, 0.1, (1e-4,), 1.0, 1.0, at=at))
    log.tell(Finished(reason, None, steps[-1][0] if steps else 0, at=150.0))


def test_a_run_is_remembered_by_its_kind(tmp_path: Path) -> None:
    told(CostWatch(job(), CPU, tmp_path, 100.0), (10, 50, 110.0), (50, 50, 127.5))
    # 7.5 s until the report, then 50 steps in 20 s.
    assert known(job(), CPU, tmp_path) == Cost(7.5, 0.4, 1234)
    assert known(job(train_learning_rate=1e-5, train_iterations=9), CPU, tmp_path) == Cost(7.5, 0.4, 1234)
    others = {"train_batch_size": 3, "network_type": "lokr", "model": "/a/other.safetensors", "mode": "iLECO"}
    assert [known(job(**{name: value}), CPU, tmp_path) for name, value in others.items()] == [None] * 4
    assert known(job(prior_loss_weight=1), CPU, tmp_path) is None, "another forward in each step"
    assert known(job(), torch.device("cuda", 0), tmp_path) is None
    told(CostWatch(job(), CPU, tmp_path, 100.0), (50, 50, 117.5))
    assert known(job(), CPU, tmp_path) == Cost(7.5, 0.2, 1234), "the last run counts"


def test_a_device_that_counts_is_believed_more_than_the_estimate(tmp_path: Path, monkeypatch) -> None:
    card, asked = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("from now", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(("peak", device)) or 7 * 2**30)
    told(CostWatch(job(), card, tmp_path, 100.0), (50, 50, 127.5))
    assert known(job(), card, tmp_path) == Cost(7.5, 0.4, 7 * 1024)
    assert asked == [("from now", card), ("peak", card)]


def test_a_switch_decides_and_its_strength_does_not(tmp_path: Path) -> None:
    pair = {"mode": "ADDifT", "prior_loss_weight": 1.0}
    told(CostWatch(job(**pair), CPU, tmp_path, 100.0), (10, 50, 110.0), (50, 50, 127.5))
    assert known(job(**{**pair, "prior_loss_weight": 3.0, "diff_strength": 0.5}), CPU, tmp_path) == Cost(7.5, 0.4, 1234)
    others = ({"diff_project": True}, {"diff_alt_ratio": 0}, {"prior_loss_weight": 0}, {"prior_batch_size": 4})
    assert [known(job(**{**pair, **other}), CPU, tmp_path) for other in others] == [None] * 4


def test_passes_are_added_up(tmp_path: Path) -> None:
    second = {"2nd pass": {"train_iterations": 30}, "use_2nd_pass_settings": True}
    pair = job(mode="Difference", train_iterations=20, **second)
    told(CostWatch(pair, CPU, tmp_path, 100.0), (10, 20, 110.0), (20, 20, 115.0), (30, 30, 132.5))
    assert known(pair, CPU, tmp_path) == Cost(7.5, 0.5, 1234)  # 20 + 30 steps in 25 s
    told(CostWatch(pair, CPU, tmp_path, 100.0), (20, 20, 115.0), (10, 20, 120.0), (20, 20, 127.5))
    assert known(pair, CPU, tmp_path) == Cost(7.5, 0.5, 1234)  # 20 + 20 steps in 20 s
    assert plain(pair, known(pair, CPU, tmp_path)) == {"steps": 50, "before": 7.5, "per_step": 0.5, "memory_mb": 1234}


@pytest.mark.parametrize("reason", ["stopped", "failed"])
def test_what_did_not_end_well_is_not_remembered(tmp_path: Path, reason: str) -> None:
    told(CostWatch(job(), CPU, tmp_path, 100.0), (10, 50, 110.0), reason=reason)
    assert known(job(), CPU, tmp_path) is None and not list(tmp_path.iterdir())


def test_a_mode_without_steps_takes_its_whole_time_before_them(tmp_path: Path) -> None:
    solved = job(mode="Instant", **{"original prompt": "a", "target prompt": "b"})
    told(CostWatch(solved, CPU, tmp_path, 100.0))
    assert known(solved, CPU, tmp_path) == Cost(50.0, 0.0, 1234) and steps_of(solved) == 0


def test_steps_before_the_pictures_are_seen() -> None:
    assert steps_of(job(train_iterations=70)) == 70
    assert steps_of(job(train_iterations=70, train_epochs=2)) is None
    assert plain(job(train_epochs=2), None) == {"steps": None, "before": None, "per_step": None, "memory_mb": None}


def test_a_damaged_file_is_no_answer(tmp_path: Path) -> None:
    told(CostWatch(job(), CPU, tmp_path, 100.0), (10, 50, 110.0))
    (path,) = tmp_path.iterdir()
    for text in ("", "{", '{"before": 1}', '{"before": "x", "per_step": 1, "memory_mb": 1}', "[]"):
        path.write_text(text, encoding="ascii")
        assert known(job(), CPU, tmp_path) is None
