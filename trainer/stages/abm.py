"""ABM initialisation (Activation Boundary Matching, 2511.19145): the adapter starts where activations have their signs.

Before the training the adapter is trained for some steps to bring the pre-activations z of gated layers to the same
side of 0 as those z* of the untouched model, and away from 0 by a margin:

    L = Σ_l ((l+1)/L)^k · mean(max(0, m·σ_c − sign(z*)·z)²) / L,   σ_c the standard deviation of z* in channel c.

In the UNet only the gate half of the GEGLU projections feeds a nonlinearity directly; elsewhere signs have no meaning.
The published code takes a trained LoRA as the teacher; here it is the untouched model, so that no other training comes
first, and the adapter is moved off its zero start by a little before, because at 0 all signs agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..maths import rng
from ..maths.weights import weight_of
from ..modes.base import Batch, Settings
from ..params.field import param
from ..params.rules import without_effect
from .base import STAGES, Preparation, Stage

POWERS = {"uniform": 0, "linear": 1, "quadratic": 2}
NUDGE = 0.02
"""‖ΔW‖ / ‖W‖ of the small random start."""
EVERY, PATIENCE, RISE = 25, 3, 1e-3
"""Steps between looks at the agreement of signs, looks without a rise before it ends, and what counts as a rise."""
AHEAD = 1 << 20
"""Added to the numbers of micro batches, so that their noise is not that of the training."""


@dataclass(frozen=True)
class AbmParams:
    """What ABM adds to the table."""

    abm_enabled: bool = param(
        False,
        "First train the adapter to keep the signs of the base model's activations (ABM, experimental).",
        "option",
    )
    abm_steps: int = param(
        500,
        "Largest number of ABM steps; it ends earlier when the signs no longer improve.",
        "option",
        low=1,
        high=100_000,
        unit="steps",
    )
    abm_lr: float = param(1e-4, "Learning rate of the ABM steps.", "option", low=0, high=1)
    abm_margin: float = param(
        0.5,
        "How far from zero activations are pushed, in standard deviations of their channel.",
        "option",
        low=0,
        high=10,
    )
    abm_weight_strategy: str = param(
        "uniform", "How much more later layers weigh than earlier ones.", "option", choices=tuple(POWERS)
    )
    abm_batch_size: int | None = param(
        None, "Images per ABM step; empty takes train_batch_size.", "option", low=1, high=4096
    )


@STAGES.register("abm")
class Abm(Stage):
    """Runs the first training and reports how many signs agree before and after."""

    turn = 1  # it trains what other stages begin with
    help = "Starts the training from an adapter that keeps the signs of the gates of the untouched model."
    sections = (AbmParams,)
    rules = (without_effect(*AbmParams.__dataclass_fields__),)

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        return settings[AbmParams].abm_enabled

    @property
    def rows(self) -> int:
        return self.settings[AbmParams].abm_batch_size or 0

    def prepare(self, at: Preparation) -> None:
        own, gates = self.settings[AbmParams], at.model.gates
        if at.resumed:
            return
        if not gates:
            at.tell("ABM was left out: this model has no gated layers.")
            return
        for adapter in at.network:
            nudge(adapter, rng.generator("abm", at.seed, adapter.key))
        before = self._agreement(at, gates)
        steps = self._train(at, gates, own)
        after = self._agreement(at, gates)
        at.tell(f"ABM: {before:.1%} of the signs agreed before, {after:.1%} after {steps} steps.")

    def _train(self, at: Preparation, gates: list[nn.Module], own: AbmParams) -> int:
        descend = at.descent(own.abm_lr)
        best, idle, power = self._agreement(at, gates), 0, POWERS[own.abm_weight_strategy]
        for step in range(own.abm_steps):
            if at.stopping():
                return step
            wanted, got = self._both(at, gates, _batch(at, step, own.abm_batch_size, AHEAD))
            loss = boundary_loss(wanted, got, own.abm_margin, power)
            descend(loss)
            if (step + 1) % EVERY == 0:
                agreed = self._agreement(at, gates)
                best, idle = (agreed, 0) if agreed > best + RISE else (best, idle + 1)
                if idle == PATIENCE:
                    return step + 1
        return own.abm_steps

    @torch.no_grad()
    def _agreement(self, at: Preparation, gates: list[nn.Module]) -> float:
        """The share of equal signs on two fixed batches."""
        shares = []
        for index in range(2):
            wanted, got = self._both(at, gates, _batch(at, index, self.settings[AbmParams].abm_batch_size, 2 * AHEAD))
            shares += [(one.sign() == two.sign()).float().mean() for one, two in zip(wanted, got, strict=True)]
        return float(torch.stack(shares).mean())

    def _both(self, at: Preparation, gates: list[nn.Module], batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Pre-activations of the untouched model and with the adapter, in the order of computation."""
        kit = at.kit
        noise, t = kit.noise(batch), kit.timesteps(batch)
        pictured = bool(batch.mean.any()) or bool(batch.std.any())
        x = kit.process.add_noise(kit.latents(batch), noise, t) if pictured else noise
        with kit.teacher(), listening(gates) as wanted:
            kit.predict(x, t, kit.text(batch.prompts), batch.time_ids)
        with listening(gates) as got:
            kit.predict(x, t, kit.text(batch.prompts), batch.time_ids)
        return wanted, got


def boundary_loss(wanted: list[Tensor], got: list[Tensor], margin: float, power: int) -> Tensor:
    """The loss above for pre-activations (…, channels) per layer, in order of computation; 0-d."""
    terms = []
    for place, (z_star, z) in enumerate(zip(wanted, got, strict=True)):
        far = margin * z_star.flatten(0, -2).std(dim=0)
        short = (far - z_star.sign() * z).clamp(min=0).square().mean()
        terms.append(((place + 1) / len(wanted)) ** power * short)
    return torch.stack(terms).sum() / len(terms)


@torch.no_grad()
def nudge(adapter: Any, generator: torch.Generator) -> None:
    """Fill what is 0 in an adapter with random numbers, so large that ‖ΔW‖ becomes NUDGE·‖W‖."""
    zeros = [p for p in adapter.parameters() if p.requires_grad and not p.any()]
    for parameter in zeros:
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    size = adapter.delta().norm()
    ratio = NUDGE * weight_of(adapter.module, torch.float32).norm() / size.clamp(min=1e-12)
    for parameter in zeros:
        parameter.mul_(ratio.to(parameter.dtype))


@contextmanager
def listening(gates: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the block the gate halves of every output are noted, float32, in the order of computation."""
    heard: list[Tensor] = []

    def hear(module: nn.Module, inputs: Any, output: Tensor) -> None:
        heard.append(output.chunk(2, dim=-1)[1].float())

    hooks = [gate.register_forward_hook(hear) for gate in gates]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _batch(at: Preparation, number: int, size: int | None, ahead: int) -> Batch:
    """A micro batch of the training with noise of its own, cut to `size` or filled up with the ones after it."""
    found = [batch for batch in (at.batch(number),) if batch is not None] or [_first(at)]
    samples, place = len(found[0].samples), number
    while size is not None and samples < size and place < number + 4 * size:
        place += 1
        more = at.batch(place)
        if more is not None and more.mean.shape[1:] == found[0].mean.shape[1:]:
            found.append(more)
            samples += len(more.samples)
    kept = size or samples
    ids = [batch.time_ids for batch in found]
    return dataclasses.replace(
        found[0],
        index=ahead + number,
        samples=tuple(range(samples))[:kept],
        prompts=tuple(prompt for batch in found for prompt in batch.prompts)[:kept],
        mean=torch.cat([batch.mean for batch in found])[:kept],
        std=torch.cat([batch.std for batch in found])[:kept],
        time_ids=None if ids[0] is None else torch.cat([row for row in ids if row is not None])[:kept],
    )


def _first(at: Preparation) -> Batch:
    """The first micro batch in which this process has a part."""
    return next(batch for batch in map(at.batch, range(1 << 20)) if batch is not None)
