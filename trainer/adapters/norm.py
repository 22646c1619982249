"""Norm: the scales and shifts of the UNet's normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..maths.lowrank import scaled
from ..maths.weights import weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .direct import Direct
from .where import ignores


@ADAPTERS.register("norm")
class Norm(Direct):
    """Δw and Δb of group and layer normalisations, both starting at 0."""

    help = (
        "Trains only the scales of the normalisation layers: a tiny file that shifts tone and style. Rank has no"
        " effect."
    )
    rules = ignores("norm", "network_rank", "network_alpha", "network_conv_rank", "network_conv_alpha")
    portable = True
    file_tensors = ("w_norm", "b_norm")
    ranked = False
    droppable = False
    factors = (("w_norm", "b_norm"),)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.w_norm = nn.Parameter(torch.zeros(weight_shape(layer.module)))
        self.b_norm = nn.Parameter(torch.zeros(weight_shape(layer.module)))

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return layer.kind in ("groupnorm", "layernorm")

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        base = self._base(x)
        update = self._operate(x.to(base.dtype), self.w_norm.to(base.dtype))
        shift = self.b_norm.to(base.dtype)
        update = update + (shift.view(-1, *(1,) * (x.ndim - 2)) if self.kind == "groupnorm" else shift)
        return base + scaled(update, strength)

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(x, module.num_groups, weight, None, module.eps)
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(x, module.normalized_shape, weight, None, module.eps)
        raise TypeError(f"{type(module).__name__} is no normalisation")

    def delta(self) -> Tensor:
        return self.w_norm.float() * 1.0

    def delta_bias(self) -> Tensor | None:
        return self.b_norm.float()
