"""T-LoRA: the noisier the picture, the fewer ranks are trained (2507.05964)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Layer
from ..params import core
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .base import AdapterSpec, Strength
from .dora import DoraOptions
from .plain_lora import Lora


@dataclass(frozen=True)
class TimestepOptions:
    """What plain LoRA and LoCon add to the table for T-LoRA."""

    network_timestep_rank: int = param(
        0,
        "Ranks trained at the noisiest timestep; more take part with less noise (T-LoRA, against overfitting). 0 is"
        " off.",
        "option",
        needs="timestep_rank",
        low=0,
        high=1024,
    )


def below_the_rank(job: Job, mode: ModeInfo) -> str:
    """A lowest rank that is none, or that comes together with DoRA."""
    lowest, rank = job[TimestepOptions].network_timestep_rank, job[core.Network].network_rank
    if lowest > rank:
        return f"is above network_rank ({rank}); write at most {rank}."
    if lowest and job[DoraOptions].use_dora:
        return "does not go together with use_dora, whose lengths are those of the whole adapter; set it to 0."
    return ""


RULES = (Rule(("network_timestep_rank", "network_rank", "use_dora"), below_the_rank),)


class TimestepRanks(Lora):
    """Put before a LoRA of the UNet, where asked only its first r(t) ranks act in a training step (T-LoRA)."""

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.lowest = spec[TimestepOptions].network_timestep_rank if layer.part == "unet" else 0

    def active_ranks(self) -> Tensor | None:
        """(B, rank) of 0 and 1, in a training step and while the UNet predicts."""
        return self.timesteps.mask(self.rank, self.lowest) if self.lowest and self.draws.on else None

    def fused(self, x: Tensor, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
        active = self.active_ranks()
        if active is not None:
            scale = active.repeat(1, len(down) // self.rank) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        return super().fused(x, down, up, scale)

    def middle(self, x: Tensor, down: Tensor) -> Tensor:
        middle, active = super().middle(x, down), self.active_ranks()
        if active is None:
            return middle
        after = (1,) * (middle.ndim - 2)
        shape = (len(active), *after, -1) if self.kind == "linear" else (len(active), -1, *after)
        return middle * active.to(middle.dtype).view(shape)
