"""GLoRA: a low-rank change of the weight's input beside a low-rank change of the weight (2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..maths.lowrank import kaiming_down, per_sample
from ..maths.weights import weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .direct import Direct
from .file_delta import ALPHA, glora_in_older_layout
from .where import ignores, in_transformer


@ADAPTERS.register("glora")
class Glora(Direct):
    """ΔW = s·(W·a2·a1 + b2·b1) with a1, b1 (r, in), a2 (in, r), b2 (out, r), on linear layers.

    This is the older of LyCORIS's two file layouts, the only one A1111 and Forge read (its newer one swaps the digits
    1 and 2); A1111 does not count alpha, so the scale is inside the file's tensors and alpha is written as the rank.
    """

    help = "Low-rank changes of each weight and of its input. Linear layers only."
    rules = ignores("glora", "network_conv_rank", "network_conv_alpha")
    portable = True
    file_tensors = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")
    named: ClassVar[Mapping[str, str]] = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
    factors = (("a1", "b1"), ("a2", "b2"))
    ups = ("a2", "b2")

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        fan_out, fan_in = weight_shape(layer.module)
        self.a1 = nn.Parameter(kaiming_down((self.rank, fan_in), generator))
        self.a2 = nn.Parameter(torch.zeros(fan_in, self.rank))
        self.b1 = nn.Parameter(kaiming_down((self.rank, fan_in), generator))
        self.b2 = nn.Parameter(torch.zeros(fan_out, self.rank))

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_transformer(layer) and layer.kind == "linear"

    def tensors(self) -> dict[str, Tensor]:
        own = {name: tensor.float() for name, tensor in super().tensors().items() if name != ALPHA}
        return {**self.rescaled(own, self.scale), ALPHA: torch.tensor(float(self.rank))}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        self.expect(tensors, tuple(self.own()), tuple(self.constants()))
        return super().read(glora_in_older_layout(tensors, *weight_shape(self.module)), factor)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        x = self.working_input(x)
        factor = self.scale * strength
        a1, a2, b1, b2 = (p.to(x.dtype) for p in (self.a1, self.a2, self.b1, self.b2))
        scale = per_sample(factor, x) if isinstance(factor, Tensor) else factor
        inside, beside = functional.linear(functional.linear(x, a1) * scale, a2), functional.linear(x, b1) * scale
        if self._plain:
            return self._base(x + inside) + functional.linear(beside, b2)
        return self._base(x) + self._operate(inside, weight_of(self.module, x.dtype)) + functional.linear(beside, b2)

    def delta(self) -> Tensor:
        a1, a2, b1, b2 = (p.float() for p in (self.a1, self.a2, self.b1, self.b2))
        return (weight_of(self.module, torch.float32) @ a2 @ a1 + b2 @ b1) * self.scale
