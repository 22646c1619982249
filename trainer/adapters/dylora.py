"""DyLoRA: a LoRA that works at every rank up to its own (2210.07558)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..contracts import Layer
from ..errors import AdapterError
from ..params import core
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .base import ADAPTERS, AdapterSpec, Strength
from .plain_lora import Lora
from .where import ignores


@dataclass(frozen=True)
class DyloraOptions:
    """What DyLoRA adds to the table."""

    network_unit: int = param(
        4,
        "Ranks are trained in steps of this many; it must divide network_rank.",
        "option",
        needs="dylora",
        low=1,
        high=1024,
    )


def unit_divides(job: Job, mode: ModeInfo) -> str:
    """A unit that does not divide the rank."""
    unit, rank = job[DyloraOptions].network_unit, job[core.Network].network_rank
    if ADAPTERS.canonical(job[core.Network].network_type) != "dylora" or rank % unit == 0:
        return ""
    divisor = next(u for u in range(min(unit, rank), 0, -1) if rank % u == 0)
    return f"does not divide network_rank ({rank}); write a divisor of it, for example {divisor}."


@ADAPTERS.register("dylora")
class Dylora(Lora):
    """In every training step only the first b ranks act, b drawn from unit, 2·unit, …, rank and the same in all layers.

    The scale is alpha / rank at every b: a file cut to b ranks does the same with alpha·b / rank as its alpha.
    """

    help = "A LoRA trained at many ranks at once, so that it can be cut to a lower rank later. Use a high rank."
    network_module = "networks.dylora"
    needs = frozenset({"dylora"})
    sections = (DyloraOptions,)
    rules = (
        Rule(("network_unit", "network_rank", "network_type"), unit_divides),
        *ignores("dylora", "network_conv_rank", "network_conv_alpha"),
    )
    inits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.unit = spec[DyloraOptions].network_unit
        if self.rank % self.unit:
            raise AdapterError(
                f"{self.key}: network_unit = {self.unit} does not divide its rank {self.rank}. Choose a divisor of"
                " network_rank and of all network_block_ranks."
            )

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        return {"unit": str(spec[DyloraOptions].network_unit)}

    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors; in a training step those of the first b ranks."""
        down, up = super().pair()
        if not self.draws.on:
            return down, up
        steps = torch.randint(self.rank // self.unit, (), generator=self.draws.generator("dylora"))
        active = self.unit * (int(steps) + 1)
        return down[:active], up[:, :active]
