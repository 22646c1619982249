"""Full: every number of the layers' weights is trained, and saved as the difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..maths.lowrank import scaled
from ..maths.rebuild import rebuilt
from ..maths.weights import bias_of, weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .direct import Direct
from .where import ignores, in_any_block


@ADAPTERS.register("full")
class Full(Direct):
    """ΔW and Δb themselves, both starting at 0."""

    help = "Trains every weight of the chosen layers: a file as large as the model, and much memory."
    rules = ignores("full", "network_rank", "network_alpha", "network_conv_rank", "network_conv_alpha")
    portable = True
    file_tensors = ("diff", "diff_b")
    ranked = False
    factors = (("diff", "diff_b"),)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.diff = nn.Parameter(torch.zeros(weight_shape(layer.module)))
        if (bias := bias_of(layer.module)) is not None:
            self.diff_b = nn.Parameter(torch.zeros(bias.shape))

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        module = self.module
        shift = self._parameters.get("diff_b")
        if self._plain and not isinstance(strength, Tensor):
            x = self.working_input(x)
            geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
            y = rebuilt(x, weight_of(module), bias_of(module), strength, _itself, (self.diff,), geometry)
            return y if shift is None else y + self._along_channels(shift * strength, y)
        base = self._base(x)
        update = self._operate(x.to(base.dtype), self.diff.to(base.dtype))
        update = update if shift is None else update + self._along_channels(shift, update)
        return base + scaled(update, strength)

    def _along_channels(self, values: Tensor, like: Tensor) -> Tensor:
        """One number for each output, shaped and cast to be added to outputs."""
        return values.to(like.dtype).view(-1, *(1,) * (0 if self.kind == "linear" else 2))

    def delta(self) -> Tensor:
        return self.diff.float() * 1.0

    def delta_bias(self) -> Tensor | None:
        shift = self._parameters.get("diff_b")
        return None if shift is None else shift.float()


def _itself(diff: Tensor) -> Tensor:
    return diff * 1.0
