"""Experts mixed by the input: their balance, and the fading of the input's part, so that one matrix remains."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modes.base import Settings
from ..params.core import Network
from ..params.spaces import ExpertParams
from .base import STAGES, Stage

FADE = (0.5, 0.9)
"""The shares of the training between which the input's part of the gates falls from all to nothing."""


@STAGES.register("routing")
class Routing(Stage):
    """Keeps the experts in balance and fades the router out."""

    help = "Lets the gates of experts depend on the input at first and on learned numbers alone at the end."

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        own = settings[ExpertParams]
        return settings[Network].network_type == "experts" and own.network_routing == "input" and own.num_experts > 1

    def step(self, network: Any, done: int, total: int) -> None:
        start, end = FADE
        for adapter in network:
            adapter.heat = min(1.0, max(0.0, (end - done / total) / (end - start)))

    def penalty(self, network: Any) -> Tensor | None:
        weight = self.settings[ExpertParams].network_routing_balance
        terms = [term for adapter in network if (term := adapter.balance()) is not None] if weight else []
        return weight * sum(terms[1:], terms[0]) / len(terms) if terms else None
