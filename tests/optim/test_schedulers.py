"""Learning-rate schedules against closed forms and against diffusers' own warm-ups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler

from trainer.errors import AtelierError, JobError
from trainer.optim.optimizers import make_optimizer
from trainer.optim.schedulers import SCHEDULERS, make_scheduler, parse_step_rules

LR, TE_LR, TOTAL = 0.4, 0.1, 40
SEED_NAMES = [
    *("cosine_annealing", "cosine_annealing_with_restarts", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "piecewise_constant", "exponential", "step", "multi_step"),
    *("reduce_on_plateau", "cyclic", "one_cycle"),
]


def optimizer() -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr, "name": name}
        for name, lr in (("unet", LR), ("te", TE_LR))
    ]
    return make_optimizer("AdamW", groups, {})


def walk(name: str, steps: int = TOTAL, loss: Callable[[int], float] = lambda step: 1.0, **options: Any) -> list[float]:
    """The rate of the first group at each of `steps` steps; the second keeps its ratio to the first."""
    options.setdefault("total_steps", TOTAL)
    schedule = make_scheduler(name, optimizer(), **options)
    seen = []
    for step in range(steps):
        first, second = schedule.rates()
        assert second == pytest.approx(first * TE_LR / LR, rel=1e-5, abs=1e-12)
        seen.append(first)
        schedule.optimizer.step()
        schedule.step(loss(step))
    return seen


def ramp(step: int, warmup: int) -> float:
    return step / warmup if step < warmup else 1.0


def test_the_names_are_the_seeds() -> None:
    assert list(SCHEDULERS.names()) == SEED_NAMES
    assert SCHEDULERS.canonical("Cosine_Annealing") == "cosine_annealing"


def closed_form(name: str, t: int, warmup: int) -> float:
    """The factor at step `t`, written from the definitions."""
    n, u = TOTAL - warmup, t - warmup
    third = math.ceil(n / 3)
    if t < warmup:
        return t / warmup
    return {
        "linear": lambda: 1 - u / n,
        "cosine": lambda: (1 + math.cos(math.pi * u / n)) / 2,
        "cosine_annealing": lambda: (1 + math.cos(math.pi * u / n)) / 2,
        "cosine_with_restarts": lambda: (1 + math.cos(math.pi * (3 * u / n % 1))) / 2,
        "cosine_annealing_with_restarts": lambda: (1 + math.cos(math.pi * (u % third) / third)) / 2,
        "polynomial": lambda: ((LR - 1e-7) * (1 - u / n) ** 2 + 1e-7) / LR,
        "constant": lambda: 1.0,
        "constant_with_warmup": lambda: 1.0,
        "piecewise_constant": lambda: 1.0 if u < 5 else 0.1 if u < 20 else 0.01,
        "exponential": lambda: 0.01 ** (u / n),
        "step": lambda: 0.1 ** (u // (n // 3)),
        "multi_step": lambda: 0.1 ** ((u >= n // 2) + (u >= n * 3 // 4)),
    }[name]()


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", [n for n in SEED_NAMES if n not in ("reduce_on_plateau", "cyclic", "one_cycle")])
def test_closed_forms(name: str, warmup: int) -> None:
    seen = walk(name, warmup=warmup, cycles=3, power=2.0, step_rules="1:5,0.1:20,0.01")
    expected = [LR * closed_form(name, t, warmup) for t in range(TOTAL)]
    assert seen == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_our_warmup_is_diffusers_to_the_bit(name: str, warmup: int) -> None:
    theirs_optimizer = optimizer()
    theirs = get_scheduler(
        name, theirs_optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, num_cycles=2, power=1.5
    )
    expected = []
    for _ in range(TOTAL):
        expected.append(theirs_optimizer.param_groups[0]["lr"])
        theirs_optimizer.step()
        theirs.step()
    assert walk(name, warmup=warmup, cycles=2, power=1.5) == expected


def test_one_cycle_rises_over_the_warmup_steps() -> None:
    seen = walk("one_cycle", warmup=10)
    assert seen[0] == pytest.approx(LR / 25) and max(seen) == pytest.approx(LR, rel=1e-2)
    assert seen.index(max(seen)) in (9, 10)
    assert seen[-1] == pytest.approx(LR / 25 / 1e4, rel=1e-6)


def test_cyclic_is_a_triangle() -> None:
    seen = walk("cyclic", cycles=2)
    up = [LR / 10 + (LR - LR / 10) * i / 10 for i in range(10)]
    expected = [*up, LR, *up[:0:-1]] * 2
    assert seen == pytest.approx(expected)


def test_plateau_falls_only_when_the_loss_does() -> None:
    falling = walk("reduce_on_plateau", loss=lambda step: 1 / (step + 1), settings={"patience": 3})
    assert falling == [LR] * TOTAL
    flat = walk("reduce_on_plateau", settings={"patience": 3, "factor": 0.5})
    assert flat[:5] == [LR] * 5 and flat[5] == LR / 2 and flat[-1] < LR / 8
    schedule = make_scheduler("reduce_on_plateau", optimizer(), total_steps=TOTAL, settings={"patience": 0})
    for _ in range(10):
        schedule.step(None)
    assert schedule.rates()[0] == LR, "no new loss, no verdict"


def test_settings_change_the_shape() -> None:
    low = walk("cosine_annealing", settings={"eta_min": 0.0}, steps=TOTAL)
    seen = [make_scheduler("cosine_annealing", optimizer(), total_steps=4, settings={"eta_min": 0.05})]
    for _ in range(4):
        seen[0].step()
    assert seen[0].rates() == pytest.approx((0.05, 0.05))
    assert low[-1] < 0.01
    assert walk("step", settings={"step_size": 10, "gamma": 0.5})[25] == LR / 4
    assert walk("polynomial", settings={"lr_end": 0.04}, steps=TOTAL)[-1] > 0.04


def test_a_run_that_goes_on_keeps_the_last_rate() -> None:
    for name in SEED_NAMES:
        options = {"step_rules": "1:5,0.1", "warmup": 3}
        if name == "reduce_on_plateau":
            continue
        schedule = make_scheduler(name, optimizer(), total_steps=10, **options)
        for _ in range(10):
            schedule.step(1.0)
        last = schedule.rates()
        schedule.step(1.0)
        assert schedule.rates() == last


@pytest.mark.parametrize("name", SEED_NAMES)
def test_an_unknown_setting_is_named(name: str) -> None:
    with pytest.raises(JobError, match="no such setting") as error:
        make_scheduler(name, optimizer(), total_steps=9, step_rules="1", settings={"eta_mim": 0.1})
    assert error.value.problems[0].field == "train_lr_scheduler_settings"
    if name == "cosine_annealing":
        assert "Did you mean eta_min?" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("polynomial", {"settings": {"lr_end": 1.0}}, "train_lr_scheduler_settings"),
        ("step", {"settings": {"step_size": "often"}}, "train_lr_scheduler_settings"),
        ("cosine", {"warmup": 40}, "train_lr_warmup_steps"),
        ("cosine", {"warmup": -1}, "train_lr_warmup_steps"),
        ("cosine", {"total_steps": 0}, "train_iterations"),
        ("cosine_with_restarts", {"cycles": 0}, "train_lr_scheduler_num_cycles"),
        ("piecewise_constant", {"step_rules": ""}, "train_lr_step_rules"),
        ("piecewise_constant", {"step_rules": "1:10,0.1:x,0.01"}, "train_lr_step_rules"),
        ("piecewise_constant", {"step_rules": "1:10,0.1:5,0.01"}, "train_lr_step_rules"),
        ("piecewise_constant", {"step_rules": "1:10,0.1:20"}, "train_lr_step_rules"),
        ("piecewise_constant", {"step_rules": "10,0.1"}, "train_lr_step_rules"),
    ],
)
def test_what_cannot_be_used_is_refused_at_its_field(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(JobError) as error:
        make_scheduler(name, optimizer(), **{"total_steps": TOTAL, **options})
    assert [problem.field for problem in error.value.problems] == [field]


def test_an_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(AtelierError, match="Did you mean 'cosine'"):
        make_scheduler("cosin", optimizer(), total_steps=9)


def test_step_rules() -> None:
    assert parse_step_rules("1:10, 0.1:20,0.01:30,0.005") == (((10, 1.0), (20, 0.1), (30, 0.01)), 0.005)
    assert parse_step_rules("0.5") == ((), 0.5)
