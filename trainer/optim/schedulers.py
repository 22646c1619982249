"""Learning-rate schedules by the names users know; the shapes are diffusers' and torch's, the warm-up is ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from ..registry import Registry
from .optimizers import rates
from .settings import accepted_settings, check_names, refuse

SETTINGS = "train_lr_scheduler_settings"


@dataclass(frozen=True)
class Shape:
    """What a schedule may be shaped by: `steps` after the warm-up, the warm-up itself, and the user's numbers."""

    steps: int
    warmup: int
    cycles: int
    power: float
    rules: str
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Recipe:
    """A library schedule: `factory(optimizer, **arguments)`. `own_warmup`: it rises by itself at the start. `restarts`:
    it starts again as often as `cycles` says.
    """

    factory: Callable[[], Callable[..., Any]]
    arguments: Callable[[Shape], dict[str, Any]] = lambda shape: {}
    fixed: tuple[str, ...] = ()
    own_warmup: bool = False
    restarts: bool = False


SCHEDULERS: Registry[Recipe] = Registry("train_lr_scheduler", "optim")
_HIDDEN = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps", "step_rules", "verbose", "scale_fn"}


class Schedule:
    """A library schedule behind a linear warm-up from 0; call `step` once after every optimizer step."""

    def __init__(self, optimizer: Optimizer, inner: Any, *, total_steps: int, warmup: int) -> None:
        self.optimizer = optimizer
        self.inner = inner
        self.total_steps = total_steps
        self.warmup = warmup
        self.done = 0
        self._first = [float(group["lr"]) for group in optimizer.param_groups]
        self._warm()

    def _warm(self) -> None:
        if self.done < self.warmup or self.done == self.warmup > 0:
            factor = self.done / self.warmup
            for group, first in zip(self.optimizer.param_groups, self._first, strict=True):
                group["lr"] = first * factor

    def step(self, loss_ema: float | None = None) -> None:
        """Move to the next step; `loss_ema` is what reduce_on_plateau watches (None: nothing new was measured)."""
        self.done += 1
        if self.done <= self.warmup:
            self._warm()
        elif self.done <= self.total_steps:  # a run that is drawn out keeps its last rate
            self._step_inner(loss_ema)

    def _step_inner(self, loss_ema: float | None) -> None:
        if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            if loss_ema is not None:
                self.inner.step(loss_ema)
            return
        with warnings.catch_warnings():
            # torch counts optimizer steps of this process: a resumed run or a skipped fp16 step looks like a mistake.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.inner.step()

    def rates(self) -> tuple[float, ...]:
        """The effective learning rate of every group, in order; `optimizers.rates` has them by name."""
        return tuple(rates(self.optimizer).values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes; `state.flatten` takes it to a file."""
        return {"done": self.done, "first": list(self._first), "inner": self.inner.state_dict()}

    def forward(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Take a fresh schedule to where `state`, of a run of another length, was; returns what it then changed in each
        group of the optimizer, whose own state is still to be restored.

        A schedule that watches the loss does not depend on the length: it goes on from `state`.
        """
        fresh = [dict(group) for group in self.optimizer.param_groups]
        if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self.load_state_dict(state)
            return [{} for _ in fresh]
        for _ in range(state["done"]):
            self.step()
        return [
            {key: value for key, value in group.items() if key == "lr" or value is not before[key]}
            for group, before in zip(self.optimizer.param_groups, fresh, strict=True)
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the rates themselves come back with the optimizer's state."""
        self.done = state["done"]
        self._first = list(state["first"])
        self.inner.load_state_dict(state["inner"])


def make_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup: int = 0,
    cycles: int = 1,
    power: float = 1.0,
    step_rules: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Schedule:
    """The schedule `name` (in any case) over `total_steps` optimizer steps, `warmup` of them linear from 0.

    `settings` are extra arguments of the library's schedule. Raises AtelierError naming the field that cannot be used.
    """
    name = SCHEDULERS.canonical(name)
    recipe = SCHEDULERS.get(name)
    settings = dict(settings or {})
    _check_numbers(total_steps, warmup, cycles)
    if recipe.restarts and cycles > total_steps - warmup:
        told = f"is more than the {total_steps - warmup} steps that {name} has; write at most that."
        refuse("train_lr_scheduler_num_cycles", cycles, told)
    _refuse_twice(settings, {"num_cycles": ("train_lr_scheduler_num_cycles", cycles != 1),
                             "T_0": ("train_lr_scheduler_num_cycles", cycles != 1),
                             "step_size_up": ("train_lr_scheduler_num_cycles", cycles != 1),
                             "power": ("train_lr_scheduler_power", power != 1.0),
                             "pct_start": ("train_lr_warmup_steps", bool(warmup))})  # fmt: skip
    own = warmup if recipe.own_warmup else 0
    lrs = tuple(float(group["lr"]) for group in optimizer.param_groups)
    shape = Shape(total_steps - warmup + own, warmup, cycles, power, step_rules, lrs)
    factory = recipe.factory()
    check_names(settings, tuple(accepted_settings(factory, _HIDDEN | set(recipe.fixed))), name, SETTINGS)
    arguments = {**recipe.arguments(shape), **settings}
    try:
        _rehearse(factory, optimizer, arguments)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        refuse(SETTINGS, settings, f"{name} does not accept this with train_learning_rate {lrs[0]:g}: {error}")
    return Schedule(optimizer, factory(optimizer, **arguments), total_steps=total_steps, warmup=warmup - own)


def _rehearse(factory: Callable[..., Any], optimizer: Optimizer, arguments: Mapping[str, Any]) -> None:
    """Let the library judge the values on a stand-in: some are looked at only when the schedule first moves."""
    groups = [{**group, "params": [torch.zeros(1)]} for group in optimizer.param_groups]
    stand_in = Schedule(Optimizer(groups, dict(optimizer.defaults)), None, total_steps=3, warmup=0)
    stand_in.inner = factory(stand_in.optimizer, **arguments)
    for _ in range(3):
        stand_in.step(1.0)


def _check_numbers(total_steps: int, warmup: int, cycles: int) -> None:
    if total_steps < 1:
        refuse("train_iterations", total_steps, "must be at least 1.")
    if not 0 <= warmup < total_steps:
        refuse("train_lr_warmup_steps", warmup, f"must be 0 or more and less than the {total_steps} steps of the run.")
    if cycles < 1:
        refuse("train_lr_scheduler_num_cycles", cycles, "must be at least 1.")


def _refuse_twice(settings: Mapping[str, Any], fields: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse a number that is given by its own field and among the settings too."""
    for name, (own, given) in fields.items():
        if given and name in settings:
            refuse(SETTINGS, f"{name}={settings[name]}", f"is set by {own} too. Keep one of the two.")


def parse_step_rules(text: str) -> tuple[tuple[tuple[int, float], ...], float]:
    """`1:10,0.1:20,0.005` → (((10, 1.0), (20, 0.1)), 0.005): factor 1 before step 10, 0.1 before step 20, then 0.005.

    Raises JobError naming the rule that cannot be read.
    """
    field = "train_lr_step_rules"
    *rules, last = (rule.strip() for rule in text.split(","))
    found: list[tuple[int, float]] = []
    for rule in rules:
        factor, colon, until = rule.partition(":")
        try:
            found.append((int(until), float(factor)))
        except ValueError:
            refuse(field, text, f"{rule!r} is not factor:step. {_RULES}")
        if not colon or (len(found) > 1 and found[-1][0] <= found[-2][0]):
            refuse(field, text, f"the steps must increase, {rule!r} does not. {_RULES}")
    try:
        return tuple(found), float(last)
    except ValueError:
        refuse(field, text, f"must end with a factor for the remaining steps, not {last!r}. {_RULES}")


_RULES = "Write factor:until-step pairs and a last factor, as in 1:100,0.1:200,0.01."


def _diffusers(function: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from diffusers import optimization

        found: Callable[..., Any] = getattr(optimization, function)
        return found

    return load


def _torch(cls: type) -> Callable[[], Callable[..., Any]]:
    return lambda: cls


def _ramp(shape: Shape) -> dict[str, Any]:
    # Our warm-up stands before the library's, which therefore gets none: the arithmetic is the same.
    return {"num_warmup_steps": 0, "num_training_steps": shape.steps}


def _piecewise(shape: Shape) -> dict[str, Any]:
    parse_step_rules(shape.rules)
    return {"step_rules": shape.rules}


def _one_cycle(shape: Shape) -> dict[str, Any]:
    rise = {"pct_start": shape.warmup / shape.steps} if shape.warmup else {}
    # Cycling momentum reaches into betas, which several of our optimizers use differently or not at all.
    return {"max_lr": list(shape.lrs), "total_steps": shape.steps, "cycle_momentum": False, **rise}


def _cyclic(shape: Shape) -> dict[str, Any]:
    half = max(1, ceil(shape.steps / (2 * shape.cycles)))
    bounds = {"base_lr": [lr / 10 for lr in shape.lrs], "max_lr": list(shape.lrs)}
    return {**bounds, "step_size_up": half, "cycle_momentum": False}


def _enter(
    name: str,
    factory: Callable[[], Callable[..., Any]],
    arguments: Callable[[Shape], dict[str, Any]] = lambda shape: {},
    restarts: bool = False,
) -> None:
    SCHEDULERS.register(name)(Recipe(factory, arguments, restarts=restarts))


# Numbers that torch leaves open or fixes at a few steps are tied to the length of the run.
_enter("cosine_annealing", _torch(lr_scheduler.CosineAnnealingLR), lambda s: {"T_max": s.steps})
_enter(
    "cosine_annealing_with_restarts",
    _torch(lr_scheduler.CosineAnnealingWarmRestarts),
    lambda s: {"T_0": ceil(s.steps / s.cycles)},
    restarts=True,
)
_enter("linear", _diffusers("get_linear_schedule_with_warmup"), _ramp)
_enter("cosine", _diffusers("get_cosine_schedule_with_warmup"), _ramp)
_enter(
    "cosine_with_restarts",
    _diffusers("get_cosine_with_hard_restarts_schedule_with_warmup"),
    lambda s: {**_ramp(s), "num_cycles": s.cycles},
    restarts=True,
)
_enter(
    "polynomial",
    _diffusers("get_polynomial_decay_schedule_with_warmup"),
    lambda s: {**_ramp(s), "power": s.power},
)
_enter("constant", _diffusers("get_constant_schedule"))
_enter("constant_with_warmup", _diffusers("get_constant_schedule"))
_enter("piecewise_constant", _diffusers("get_piecewise_constant_schedule"), _piecewise)
_enter("exponential", _torch(lr_scheduler.ExponentialLR), lambda s: {"gamma": 0.01 ** (1 / s.steps)})
_enter("step", _torch(lr_scheduler.StepLR), lambda s: {"step_size": max(1, s.steps // 3)})
_enter("multi_step", _torch(lr_scheduler.MultiStepLR), lambda s: {"milestones": [s.steps // 2, s.steps * 3 // 4]})
_enter("reduce_on_plateau", _torch(lr_scheduler.ReduceLROnPlateau), lambda s: {"patience": max(10, s.steps // 20)})
_enter("cyclic", _torch(lr_scheduler.CyclicLR), _cyclic, restarts=True)
SCHEDULERS.register("one_cycle")(Recipe(_torch(lr_scheduler.OneCycleLR), _one_cycle, own_warmup=True))
