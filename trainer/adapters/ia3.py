"""IA³: one number for each output (or input) of a few layers (2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..contracts import KEYS_AND_VALUES, Layer, Role
from ..errors import AdapterError
from ..maths.lowrank import per_sample
from ..maths.weights import bias_of, weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .checked import single
from .direct import Direct
from .where import ignores


@ADAPTERS.register("ia3")
class Ia3(Direct):
    """ΔW = W·w: each row of W by its number, or each column where it acts on the input. w starts at 0.

    As in LyCORIS: keys and values by rows, the second layer of each feed-forward by columns.
    """

    help = "One factor per channel in a few layers: the smallest file. Learning rate 5e-3 to 1e-2; rank has no effect."
    rules = ignores("ia3", "network_rank", "network_alpha", "network_conv_rank", "network_conv_alpha")
    file_tensors = ("weight", "on_input")
    exact = frozenset({"on_input"})
    ranked = False
    factors = (("weight",),)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.on_input = layer.role is Role.FF_OUT
        self.weight = nn.Parameter(torch.zeros(weight_shape(layer.module)[1 if self.on_input else 0]))

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return layer.kind == "linear" and layer.role in KEYS_AND_VALUES | {Role.FF_OUT}

    def constants(self) -> dict[str, float]:
        return {"on_input": int(self.on_input)}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        side = tensors.get("on_input")
        if side is not None and bool(single(side)) != self.on_input:
            there, here = ("output", "input") if self.on_input else ("input", "output")
            raise AdapterError(
                f"{self.key}: the file acts on the {there} of this layer, here it is the {here}."
                " It was made with other targets and cannot be continued."
            )
        return super().read(tensors, factor)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        x = self.working_input(x)
        scale = self.weight.to(x.dtype) * (per_sample(strength, x) if isinstance(strength, Tensor) else strength)
        module = self.module
        if not self._plain:
            update = self._operate(x * scale if self.on_input else x, weight_of(module, x.dtype))
            return self._base(x) + (update if self.on_input else update * scale)
        if self.on_input:
            return self._base(torch.addcmul(x, x, scale))
        y = self._base(x)
        bias = bias_of(module)
        product = y if bias is None else y - bias.to(y.dtype)
        return torch.addcmul(y, product, scale)

    def delta(self) -> Tensor:
        weight = weight_of(self.module, torch.float32)
        return weight * (self.weight.float() if self.on_input else self.weight.float()[:, None])
