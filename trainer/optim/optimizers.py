"""Optimizers by the names users know; every one is a library's, imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import AtelierError, MissingPackageError, pip_install
from ..registry import Registry
from .repairs import REPAIRS
from .settings import accepted_settings, check_names, refuse

SETTINGS = "train_optimizer_settings"
OPTIMIZERS: Registry[OptimizerTraits] = Registry("train_optimizer", "optim")


@dataclass(frozen=True)
class OptimizerTraits:
    """Where an optimizer comes from and what it needs.

    `module`, `cls`: the library class. `fixed`: arguments that make it what its name says. `defaults`: arguments where
    the library's default is not ours. `swallowed`: settings its constructor takes through `**kwargs`.
    `schedule_free`: its weights are averaged only inside `evaluating`. `wants_lr_one`: finds its own step size, one for
    all groups, and reads the learning rate as a factor. `takes_model`: is built from names and parameters. `state`:
    bytes that it keeps for each trained number.
    """

    module: str
    cls: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    swallowed: tuple[str, ...] = ()
    schedule_free: bool = False
    wants_lr_one: bool = False
    takes_model: bool = False
    state: float = 8.0

    @property
    def package(self) -> str:
        """The importable package of the library."""
        return self.module.partition(".")[0]

    @property
    def needs_cuda(self) -> bool:
        """Whether the parameters must live on a CUDA device."""
        return self.package == "bitsandbytes"


def _enter(name: str, module: str, cls: str, **traits: Any) -> None:
    OPTIMIZERS.register(name)(OptimizerTraits(module, cls, **traits))


_FREE: dict[str, Any] = {"schedule_free": True}
_ADAPTS: dict[str, Any] = {"wants_lr_one": True}
_enter("AdamW", "torch.optim", "AdamW")
_enter("AdamW8bit", "bitsandbytes.optim", "AdamW8bit", state=2.0)
# Of the two well-known AdaFactors this is the one whose settings (scale_parameter, warmup_init, …) recipes use. Its
# own default ignores the learning rate.
_OWN_RATE_OFF = {"relative_step": False, "scale_parameter": False}
_enter("AdaFactor", "transformers.optimization", "Adafactor", defaults=_OWN_RATE_OFF, state=0.0)
_enter("Lion", "pytorch_optimizer", "Lion", swallowed=("use_gc", "adanorm", "adanorm_r", "cautious"), state=4.0)
_enter("Prodigy", "pytorch_optimizer", "Prodigy", **_ADAPTS, state=16.0)
_enter("DadaptAdam", "pytorch_optimizer", "DAdaptAdam", **_ADAPTS, state=12.0)
_enter("DadaptLion", "pytorch_optimizer", "DAdaptLion", **_ADAPTS)
_enter("DAdaptAdaGrad", "pytorch_optimizer", "DAdaptAdaGrad", **_ADAPTS, state=12.0)
_enter("DAdaptAdan", "pytorch_optimizer", "DAdaptAdan", **_ADAPTS, state=20.0)
_enter("DAdaptSGD", "pytorch_optimizer", "DAdaptSGD", **_ADAPTS, state=12.0)
_enter("Adam8bit", "bitsandbytes.optim", "Adam8bit", state=2.0)
_enter(
    "SGDNesterov8bit", "bitsandbytes.optim", "SGD8bit", fixed={"nesterov": True}, defaults={"momentum": 0.9}, state=1.0
)
_enter("Lion8bit", "bitsandbytes.optim", "Lion8bit", state=1.0)
_enter("PagedAdamW8bit", "bitsandbytes.optim", "PagedAdamW8bit", state=2.0)
_enter("PagedLion8bit", "bitsandbytes.optim", "PagedLion8bit", state=1.0)
_enter("RAdamScheduleFree", "pytorch_optimizer", "ScheduleFreeRAdam", **_FREE)
_enter("AdamWScheduleFree", "pytorch_optimizer", "ScheduleFreeAdamW", **_FREE)
_enter("SGDScheduleFree", "pytorch_optimizer", "ScheduleFreeSGD", **_FREE, state=4.0)
_enter("CAME", "pytorch_optimizer", "CAME", state=4.0)
_enter("Tiger", "pytorch_optimizer", "Tiger", state=4.0)
_enter("AdamMini", "pytorch_optimizer", "AdamMini", takes_model=True, state=4.0)
_enter("PagedAdamW", "bitsandbytes.optim", "PagedAdamW")
_enter("PagedAdamW32bit", "bitsandbytes.optim", "PagedAdamW32bit")
_enter("SGDNesterov", "torch.optim", "SGD", fixed={"nesterov": True}, defaults={"momentum": 0.9}, state=4.0)
_enter("Adam", "torch.optim", "Adam")


def state_bytes(name: str, numbers: int) -> int:
    """About what the optimizer `name` keeps for so many trained numbers in float32, in bytes."""
    return round(OPTIMIZERS.get(name).state * numbers)


def make_optimizer(
    name: str, param_groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], model: nn.Module | None = None
) -> Optimizer:
    """The optimizer `name` (in any case) over `param_groups`, each `{"params": …, "lr": …, "name": …}`.

    `settings` are the user's extra arguments; `model` gives parameter names to optimizers that sort by them.
    Raises AtelierError for an unknown name, setting or value, a missing package or GPU, or rates that cannot differ.
    """
    name = OPTIMIZERS.canonical(name)
    traits = OPTIMIZERS.get(name)
    groups = [{**group, "params": list(group["params"])} for group in param_groups]
    groups = [group for group in groups if group["params"]]
    _check_groups(name, traits, groups)
    cls = _load(name, traits, groups[0]["params"][0].device.type)
    arguments = {**traits.defaults, **_fast_path(cls, settings), **checked_settings(name, settings), **traits.fixed}
    parameters: Any = _Named(groups, model) if traits.takes_model else groups
    try:
        # The library judges the values; whatever it raises is about them.
        optimizer: Optimizer = cls(parameters, lr=groups[0]["lr"], **arguments)
    except Exception as error:
        refuse(SETTINGS, dict(settings), f"{name} does not accept this: {error}")
    if traits.takes_model:
        _adopt_groups(optimizer, groups)
    return optimizer


def checked_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` if the optimizer `name` knows them all. Raises JobError with the nearest known names otherwise."""
    traits = OPTIMIZERS.get(name)
    if "lr" in settings:
        refuse(SETTINGS, "lr", "the learning rate has its own field: train_learning_rate.")
    hidden = {"params", "model", "lr", "args", *traits.fixed}
    known = (*accepted_settings(_load(name, traits), hidden), *traits.swallowed)
    check_names(settings, known, name, SETTINGS)
    if traits.module == "transformers.optimization" and settings.get("relative_step"):
        refuse(SETTINGS, "relative_step=True", "would ignore train_learning_rate. Remove it, or take Prodigy.")
    return dict(settings)


def _check_groups(name: str, traits: OptimizerTraits, groups: Sequence[Mapping[str, Any]]) -> None:
    if not groups:
        raise AtelierError(f"{name} was given no parameters: the chosen blocks and targets leave nothing to train.")
    lrs = {group["lr"] for group in groups}
    for lr in lrs:
        if not (math.isfinite(lr) and lr >= 0):
            refuse("train_learning_rate", lr, "must be a finite number, 0 or more.")
    if traits.wants_lr_one and len(lrs) > 1:
        shown = ", ".join(f"{group.get('name', 'group')} {group['lr']:g}" for group in groups)
        refuse(
            "train_optimizer",
            name,
            f"has one step size for everything and cannot keep different learning rates apart ({shown}). "
            "Leave the other rates empty, or take AdamW.",
        )


def _load(name: str, traits: OptimizerTraits, device: str = "cuda") -> Any:
    """The library class. Raises AtelierError when the GPU or the package it needs is not there."""
    if traits.needs_cuda and device != "cuda":
        refuse("train_optimizer", name, f"needs an NVIDIA GPU, the LoRA is on {device}. Take {_plain(name)} instead.")
    if importlib.util.find_spec(traits.package) is None:
        raise MissingPackageError(f"train_optimizer = {name}", distribution(traits.package))
    try:
        cls = getattr(importlib.import_module(traits.module), traits.cls)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise AtelierError(
            f"train_optimizer = {name}: the package {traits.package} is installed but cannot be used ({error}). "
            f"Reinstall it with: {pip_install('-U', distribution(traits.package))}"
        ) from error
    repair = REPAIRS.get((traits.module, traits.cls))
    return repair(cls) if repair else cls


def distribution(package: str) -> str:
    """The name by which pip knows an importable package of an optimizer."""
    return package.replace("_", "-")


def _plain(name: str) -> str:
    return name.replace("Paged", "").replace("32bit", "").replace("8bit", "")


def _fast_path(cls: type, settings: Mapping[str, Any]) -> dict[str, bool]:
    """One fused kernel per tensor instead of a dozen small ones: LoRAs have hundreds of tiny tensors."""
    if cls not in (torch.optim.Adam, torch.optim.AdamW) or {"fused", "foreach"} & set(settings):
        return {}
    fused_everywhere = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 4)
    return {"fused": True} if fused_everywhere else {"foreach": True}


class _Named:
    """What AdamMini asks of a model: names and parameters, here exactly those of the groups and in their order."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], model: nn.Module | None) -> None:
        known = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        self._pairs = [
            (known.get(id(p), f"{group.get('name', 'group')}.{i}"), p)
            for group in groups
            for i, p in enumerate(group["params"])
        ]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._pairs)


def _adopt_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the per-parameter groups of an optimizer built from a model the rates and labels of ours."""
    owner = {id(p): group for group in groups for p in group["params"]}
    for theirs in optimizer.param_groups:
        ours = owner[id(theirs["params"][0])]
        theirs.update({key: value for key, value in ours.items() if key not in ("params", "name")})
        theirs["label"] = ours.get("name", "")


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Group name → learning rate as it acts now: for D-Adaptation and Prodigy the found step size times the factor."""
    found: dict[str, float] = {}
    for i, group in enumerate(optimizer.param_groups):
        label = group.get("label") or group.get("name") or f"group {i}"
        found.setdefault(label, float(group["lr"]) * float(group.get("d", 1.0)))
    return found


def advice(name: str, lrs: Sequence[float], scheduler: str = "constant") -> tuple[str, ...]:
    """What a user of this optimizer should hear before a run, as sentences for the log."""
    name = OPTIMIZERS.canonical(name)
    traits = OPTIMIZERS.get(name)
    said = []
    if traits.wants_lr_one and lrs and max(lrs) < 0.1:
        said.append(
            f"{name} finds its own step size and wants train_learning_rate 1; {max(lrs):g} is used as given and "
            "makes every step that much smaller."
        )
    if traits.schedule_free and scheduler.lower() not in ("constant", "constant_with_warmup"):
        said.append(
            f"{name} needs no schedule: its authors advise train_lr_scheduler constant, {scheduler} is used as given."
        )
    return tuple(said)


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are the ones to save or sample with; afterwards they are what they were, bit for bit.

    Schedule-free optimizers train on a different point than the one they recommend; for all others this does nothing.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not any(group.get("train_mode") for group in inner.param_groups):
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    training = [p.detach().clone() for p in parameters]  # their train() undoes eval() only up to rounding
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for p, kept in zip(parameters, training, strict=True):
                p.copy_(kept)
