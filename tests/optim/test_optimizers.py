"""Optimizers: every name works, continues bit for bit after a restart through real files, and refuses clearly."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer.errors import AtelierError, JobError, MissingPackageError
from trainer.maths.scaling import LossScaler
from trainer.optim import optimizers
from trainer.optim.optimizers import OPTIMIZERS, advice, evaluating, make_optimizer, rates
from trainer.optim.schedulers import SCHEDULERS, make_scheduler
from trainer.optim.settings import parse_settings
from trainer.optim.state import flatten, restore, unflatten

NAMES = OPTIMIZERS.names()
ON_CPU = [name for name in NAMES if not OPTIMIZERS.get(name).needs_cuda]
ON_CUDA = [name for name in NAMES if OPTIMIZERS.get(name).needs_cuda]
SEED_NAMES = [
    *("AdamW", "AdamW8bit", "AdaFactor", "Lion", "Prodigy", "DadaptAdam", "DadaptLion", "DAdaptAdaGrad", "DAdaptAdan"),
    *("DAdaptSGD", "Adam8bit", "SGDNesterov8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit", "RAdamScheduleFree"),
    *("AdamWScheduleFree", "SGDScheduleFree", "CAME", "Tiger", "AdamMini", "PagedAdamW", "PagedAdamW32bit"),
    *("SGDNesterov", "Adam"),
]


class Toy(torch.nn.Module):
    """Tensors like a LoRA's: low-rank matrices, a convolution, a vector; losses are a pure function of the step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        shapes = {"down": (4, 10), "up": (10, 4), "conv": (4, 3, 3, 3), "te_down": (2, 6), "te_norm": (6,)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=draw).to(dtype)
            if len(shape) == 4:
                value = value.to(memory_format=torch.channels_last)
            setattr(self, name, torch.nn.Parameter(value))

    def groups(self, lr: float, te_lr: float | None = None) -> list[dict[str, Any]]:
        return [
            {"params": [self.down, self.up, self.conv], "lr": lr, "name": "unet"},
            {"params": [self.te_down, self.te_norm], "lr": te_lr or lr, "name": "te"},
        ]

    def loss(self, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        total = torch.zeros(())
        for p in self.parameters():
            target = torch.randn(p.shape, generator=draw)
            total = total + (p.float() - target).square().mean() + (p.float().sum() * 0.1).cos()
        return total


class Run:
    """A toy, its optimizer and its schedule, able to go on from files."""

    def __init__(self, optimizer: str, scheduler: str = "cosine", dtype: torch.dtype = torch.float32, **schedule: Any):
        self.toy = Toy(dtype)
        lr = 1.0 if OPTIMIZERS.get(optimizer).wants_lr_one else 0.01
        self.optimizer = make_optimizer(optimizer, self.toy.groups(lr), {}, self.toy)
        options: dict[str, Any] = {"total_steps": 10, "step_rules": "1:3,0.5:6,0.1", "warmup": 2, **schedule}
        self.schedule = make_scheduler(scheduler, self.optimizer, **options)
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.toy.loss(step)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            self.schedule.step(1.0)  # a loss that never improves: plateau schedules must react
        return self

    def save(self, folder: Path) -> None:
        tree = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        tensors, rest = flatten(tree)
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(rest, allow_nan=False), encoding="utf-8")
        weights = {name: p.detach().clone().contiguous() for name, p in self.toy.named_parameters()}
        save_file(weights, folder / "weights.safetensors")

    def load(self, folder: Path) -> Run:
        rest = json.loads((folder / "state.json").read_text("utf-8"))
        tree = unflatten(load_file(folder / "state.safetensors"), rest)
        self.toy.load_state_dict(load_file(folder / "weights.safetensors"))
        restore(self.optimizer, tree["optimizer"])
        self.schedule.load_state_dict(tree["schedule"])
        return self

    def bits(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.toy.parameters()]


def assert_same_bits(one: Run, other: Run) -> None:
    for a, b in zip(one.bits(), other.bits(), strict=True):
        assert torch.equal(a, b)
    assert rates(one.optimizer) == rates(other.optimizer)


def resumed(folder: Path, *arguments: Any, **options: Any) -> Run:
    Run(*arguments, **options).train(0, 5).save(folder)
    return Run(*arguments, **options).load(folder).train(5, 10)


def test_every_name_of_the_seed_is_there_in_any_case() -> None:
    assert list(NAMES) == SEED_NAMES
    for name in SEED_NAMES:
        assert OPTIMIZERS.canonical(name.lower()) == name == OPTIMIZERS.canonical(name.upper())


@pytest.mark.parametrize("name", ON_CPU)
def test_resume_is_bit_identical(name: str, tmp_path: Path) -> None:
    straight = Run(name).train(0, 10)
    assert not torch.equal(straight.bits()[0], Toy().down)
    assert_same_bits(straight, resumed(tmp_path, name))


@pytest.mark.parametrize("name", ON_CPU)
def test_resume_is_bit_identical_with_bfloat16_weights(name: str, tmp_path: Path) -> None:
    assert_same_bits(Run(name, dtype=torch.bfloat16).train(0, 10), resumed(tmp_path, name, dtype=torch.bfloat16))


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
@pytest.mark.parametrize("warmup", [0, 3, 7])
def test_every_schedule_resumes_bit_identically(scheduler: str, warmup: int, tmp_path: Path) -> None:
    options = {"warmup": warmup, "cycles": 2}
    if scheduler == "reduce_on_plateau":
        options["settings"] = {"patience": 1}
    assert_same_bits(Run("AdamW", scheduler, **options).train(0, 10), resumed(tmp_path, "AdamW", scheduler, **options))


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_takes_every_schedule(name: str) -> None:
    for scheduler in SCHEDULERS.names():
        Run(name, scheduler).train(0, 3)


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    """On a bowl of 124 numbers, each 1 from its target, within 300 steps of a usual rate."""
    p, bare = torch.nn.Parameter(torch.zeros(31, 4)), torch.nn.Module()
    target = torch.ones(31, 4)
    target[::2] = -1
    lr = 1.0 if OPTIMIZERS.get(name).wants_lr_one else 0.02
    optimizer = make_optimizer(name, [{"params": [p], "lr": lr, "name": "unet"}], {}, bare)
    for _ in range(300):
        optimizer.zero_grad()
        ((p - target) ** 2).sum().backward()
        optimizer.step()
    with evaluating(optimizer):
        assert ((p - target) ** 2).mean() < 0.15


@pytest.mark.parametrize("name", ON_CPU)
def test_evaluating_gives_the_training_weights_back_bit_for_bit(name: str) -> None:
    # Eight steps: rectified Adam does not move the weights in its first five.
    run, plain = Run(name).train(0, 8), Run(name).train(0, 8)
    before = run.bits()
    with evaluating(run.optimizer):
        differs = not torch.equal(before[0], run.toy.down)
    assert differs == OPTIMIZERS.get(name).schedule_free
    assert all(torch.equal(a, b) for a, b in zip(before, run.bits(), strict=True))
    assert_same_bits(run.train(8, 10), plain.train(8, 10))


def test_schedule_free_saves_the_average_of_its_iterates() -> None:
    """With a constant rate the recommended point is the average of the z iterates (Defazio et al. 2024, eq. 3-5)."""
    p = torch.nn.Parameter(torch.tensor([4.0]))
    optimizer = make_optimizer("SGDScheduleFree", [{"params": [p], "lr": 0.1, "name": "unet"}], {"momentum": 0.9})
    z, x, y = 4.0, 4.0, 4.0
    for step in range(1, 6):
        optimizer.zero_grad()
        (p * p / 2).sum().backward()
        optimizer.step()
        z -= 0.1 * y
        x += (z - x) / step
        y = 0.1 * z + 0.9 * x
    with evaluating(optimizer):
        assert p.item() == pytest.approx(x, rel=1e-5)
    assert p.item() == pytest.approx(y, rel=1e-5)


def test_adamw_is_the_textbook_and_takes_the_fused_path() -> None:
    toy = Toy()
    optimizer = make_optimizer("adamw", toy.groups(0.01, 0.002), {"betas": (0.8, 0.9), "weight_decay": 0.1})
    assert all(group["fused"] for group in optimizer.param_groups)
    p = toy.te_norm.detach().double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 4):
        optimizer.zero_grad()
        toy.loss(step).backward()
        grad = toy.te_norm.grad.double().clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad * grad
        p = p * (1 - 0.002 * 0.1) - 0.002 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(toy.te_norm.detach().double(), p, rtol=1e-6, atol=1e-7)


def test_dadapt_adan_follows_its_paper() -> None:
    """One number, by hand: Adan (Xie et al. 2022, algorithm 1) with the step size of Defazio & Mishchenko 2023."""
    p = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    groups = [{"params": [p], "lr": 1.0, "name": "unet"}]
    optimizer = make_optimizer("DAdaptAdan", groups, {"betas": (0.9, 0.8, 0.95), "d0": 0.01, "eps": 1e-8})
    x, d, m, v, n, s, weighted, last = 3.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, None
    for _ in range(6):
        optimizer.zero_grad()
        (p**4 / 4).sum().backward()
        optimizer.step()
        g = x**3
        change = 0.0 if last is None else g - last
        m, v = 0.9 * m + d * 0.1 * g, 0.8 * v + d * 0.2 * change
        n = 0.95 * n + 0.05 * (g + 0.8 * change) ** 2
        root = math.sqrt(n) + 1e-8
        s = 0.95 * s + d * 0.05 * g
        weighted = 0.95 * weighted + 0.05 * d * d * g * g / root
        x -= (m + 0.8 * v) / root
        d = max(d, (s * s / root / 0.05 - weighted) / abs(s))
        last = g
        assert p.item() == pytest.approx(x, rel=1e-5)
    assert rates(optimizer)["unet"] == pytest.approx(d, rel=1e-5) and d > 0.01


def test_adam_mini_keeps_our_rates_and_trains_only_what_it_was_given() -> None:
    toy = Toy()
    kept = toy.conv.detach().clone()
    groups = toy.groups(0.01, 0.002)
    groups[0]["params"] = [toy.down, toy.up]
    optimizer = make_optimizer("AdamMini", groups, {"weight_decay": 0.0}, toy)
    assert rates(optimizer) == {"unet": 0.01, "te": 0.002}
    toy.loss(0).backward()
    optimizer.step()
    assert torch.equal(toy.conv, kept) and not torch.equal(toy.te_down, Toy().te_down)


def test_rates_show_the_step_size_prodigy_found() -> None:
    run = Run("Prodigy", "constant", warmup=0).train(0, 10)
    found = run.optimizer.param_groups[0]["d"]
    assert found > 1e-6
    assert run.schedule.rates() == (found, found)
    assert rates(run.optimizer) == {"unet": found, "te": found}


def test_only_the_self_tuning_ones_refuse_different_rates() -> None:
    for name in ON_CPU:
        toy = Toy()
        if OPTIMIZERS.get(name).wants_lr_one:
            with pytest.raises(JobError, match=r"unet 1, te 0\.5"):
                make_optimizer(name, toy.groups(1.0, 0.5), {}, toy)
        else:
            assert rates(make_optimizer(name, toy.groups(0.1, 0.05), {}, toy)) == {"unet": 0.1, "te": 0.05}


@pytest.mark.parametrize("name", ON_CPU)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(name: str) -> None:
    toy = Toy()
    with pytest.raises(JobError, match="weight_decay") as error:
        make_optimizer(name, toy.groups(1.0), {"weight_deccay": 0.1}, toy)
    assert error.value.problems[0].field == "train_optimizer_settings"
    assert "Did you mean weight_decay?" in str(error.value)


def test_bad_values_and_places_are_refused() -> None:
    toy = Toy()
    for name, settings, said in (
        ("AdamW", {"lr": 1.0}, "train_learning_rate"),
        ("AdamW", {"betas": (0.9, 1.5)}, "AdamW does not accept this"),
        ("Lion", {"weight_decay": "much"}, "Lion does not accept this"),
        ("SGDNesterov", {"momentum": 0}, "(?i)momentum"),
        ("SGDNesterov", {"nesterov": False}, "no such setting"),
        ("AdaFactor", {"relative_step": True}, "would ignore train_learning_rate"),
    ):
        with pytest.raises(JobError, match=said):
            make_optimizer(name, toy.groups(0.1), settings, toy)
    with pytest.raises(AtelierError, match="Did you mean 'AdamW'"):
        make_optimizer("AdanW", toy.groups(0.1), {})
    with pytest.raises(AtelierError, match="nothing to train"):
        make_optimizer("AdamW", [{"params": [], "lr": 0.1}], {})
    with pytest.raises(JobError, match="finite"):
        make_optimizer("AdamW", toy.groups(math.nan), {})


def test_settings_reach_the_optimizer() -> None:
    toy = Toy()
    group = make_optimizer("Prodigy", toy.groups(1.0), parse_settings("d_coef=2.0; betas=0.9,0.95")).param_groups[0]
    assert group["d_coef"] == 2.0 and group["betas"] == (0.9, 0.95)
    assert make_optimizer("Lion", toy.groups(0.1), {"cautious": True}).param_groups[0]["cautious"] is True
    assert not make_optimizer("AdamW", toy.groups(0.1), {"foreach": False}).param_groups[0]["fused"]


@pytest.mark.parametrize("name", ON_CUDA)
def test_eight_bit_and_paged_ones_say_what_they_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="needs an NVIDIA GPU") as error:
        make_optimizer(name, Toy().groups(0.1), {})
    problem = error.value.problems[0]
    assert (problem.field, problem.value) == ("train_optimizer", name)
    instead = problem.message.split("Take ")[1].split(" ")[0]
    assert not OPTIMIZERS.get(instead).needs_cuda
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingPackageError, match="pip install bitsandbytes"):
        optimizers.checked_settings(name, {})


def test_advice() -> None:
    assert "wants train_learning_rate 1" in advice("prodigy", [1e-4])[0]
    assert advice("prodigy", [1.0]) == () == advice("AdamW", [1e-4], "cosine")
    assert "constant" in advice("AdamWScheduleFree", [1e-3], "cosine")[0]


def test_parse_settings() -> None:
    text = "betas=(0.9,0.99);weight_decay=0.01\r\n eps = 1e-8 ;\nname='x=y'; flag=True;nothing=None;pair=0.9,0.95"
    assert parse_settings(text) == {
        "betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-8, "name": "x=y", "flag": True, "nothing": None,
        "pair": (0.9, 0.95),
    }  # fmt: skip
    assert parse_settings("") == parse_settings(" ;\n") == {}
    deep = "x=" + "(" * 9999
    for bad in ("betas", "=1", "a b=1", "eps=tiny", "x=__import__('os')", "x=1+", "flag=true", "a=1;a=2", deep):
        with pytest.raises(JobError) as error:
            parse_settings(bad, "train_lr_scheduler_settings")
        assert error.value.problems[0].field == "train_lr_scheduler_settings"


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
    ),
    max_leaves=20,
)


@given(TREES)
def test_flatten_round_trips_plain_trees_through_json(tree: Any) -> None:
    tensors, rest = flatten(tree)
    back = unflatten(tensors, json.loads(json.dumps(rest, allow_nan=False)))
    assert back == tree and repr(back) == repr(tree)


def test_flatten_keeps_tensors_of_every_kind_apart() -> None:
    shared = torch.arange(6).reshape(2, 3)
    tree = {
        "a.b": torch.tensor(1.5, dtype=torch.float64), "a": {"b": torch.tensor(2, dtype=torch.uint8)}, 3: shared.T,
        "same": shared, "half": torch.ones(0, dtype=torch.bfloat16), "count": Counter({5: 2}), "type": torch.float16,
        "nan": math.nan,
    }  # fmt: skip
    tensors, rest = flatten(tree)
    back = unflatten(tensors, json.loads(json.dumps(rest, allow_nan=False)))
    for key in ("a.b", 3, "same", "half"):
        assert back[key].dtype == tree[key].dtype and torch.equal(back[key], tree[key])
    assert back["a"]["b"].item() == 2 and back["type"] is torch.float16 and math.isnan(back["nan"])
    assert isinstance(back["count"], Counter) and back["count"] == tree["count"]
    shared.zero_()
    assert back["same"].sum() == 15, "the state must be a snapshot"
    with pytest.raises(TypeError, match="function"):
        flatten({"f": flatten})


def test_a_scaler_that_is_off_changes_nothing_and_its_state_round_trips() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([4.0])
    optimizer, off = torch.optim.SGD([weight], lr=0.5), LossScaler([weight.grad], False)
    off.unscale_(optimizer)
    off.step(optimizer)
    off.update()
    assert weight.item() == 0.0 and off.scale(weight) is weight and off.state_dict() == {}
    scaler = LossScaler([torch.zeros(2)], True)
    tensors, rest = flatten(scaler.state_dict())
    assert unflatten(tensors, json.loads(json.dumps(rest))) == scaler.state_dict()
