"""LoHa: the elementwise product of two low-rank matrices, of rank up to r² (FedPara 2108.06098; LyCORIS 2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..maths.hadamard import Factors, hadamard_delta, hadamard_layer, hadamard_norms, plain_factors, thin_pays
from ..maths.lowrank import scaled, stride_area
from ..maths.rebuild import rebuilt
from ..maths.weights import bias_of, weight_matrix, weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength, is_wide
from .direct import Direct, normal
from .dora import DORA_RULES, Decomposed, DoraOptions
from .file_delta import ALPHA, CORES, HADAMARD, MAGNITUDE
from .library import EAGER, functional
from .tucker import TuckerOptions
from .where import in_any_block


class HadamardProduct(Direct):
    """ΔW = (alpha/rank)·(w1a·w1b) ⊙ (w2a·w2b); with tucker cores t (r, r, k, k) for kernels above 1×1.

    Shapes: wa (out, r), wb (r, in·k·k); with cores wa (r, out), wb (r, in).
    """

    portable = True
    file_tensors = (*HADAMARD, *CORES, ALPHA, MAGNITUDE)
    factors = (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",))
    ups = ("hada_w1_a", "hada_w2_a")

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        fan_out, fan_in, *kernel = weight_shape(layer.module)
        self.tucker = is_wide(layer.kind) and spec[TuckerOptions].network_tucker
        outer = (self.rank, fan_out) if self.tucker else (fan_out, self.rank)
        inner = (self.rank, fan_in if self.tucker else weight_matrix(layer.module)[1])
        self.hada_w1_a, self.hada_w1_b = normal(outer, 0.1, generator), normal(inner, 1.0, generator)
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.zeros(outer)), normal(inner, 1.0, generator)
        if self.tucker:
            core = (self.rank, self.rank, *kernel)
            self.hada_t1, self.hada_t2 = normal(core, 0.1, generator), normal(core, 0.1, generator)

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    def _factors(self) -> Factors:
        """A₁ (out, r), B₁ (r, in·k·k), A₂, B₂ of ΔW = scale·(A₁·B₁) ⊙ (A₂·B₂); a core belongs to its B."""
        names = HADAMARD + CORES if self.tucker else HADAMARD
        return plain_factors([getattr(self, name) for name in names])

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        module, factors = self.module, self._factors()
        if self._plain:
            x, scale = self.working_input(x), self.scale * strength
            geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
            rows = x.numel() // x.shape[-1 if geometry is None else 1] // stride_area(geometry)
            if thin_pays(rows, len(factors[1].T), len(factors[0]), self.rank):
                return hadamard_layer(x, weight_of(module), bias_of(module), factors, scale, geometry)
            if not isinstance(scale, Tensor):
                return rebuilt(x, weight_of(module), bias_of(module), scale, self._product, factors, geometry)
        base = self._base(x)
        return base + scaled(self.update(x.to(base.dtype)), strength)

    def update(self, x: Tensor) -> Tensor:
        """ΔW·x at strength 1, without bias."""
        module = self.module
        if not self._zero_padded:
            return self._operate(x, self._product(*self._factors()).to(x.dtype) * self.scale)
        geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
        return rebuilt(x, None, None, self.scale, self._product, self._factors(), geometry)

    def square_norms(self, on_input: bool) -> Tensor:
        """‖W + ΔW‖² − ‖W‖² for each input or output."""
        return hadamard_norms(weight_of(self.module), self._factors(), self.scale, on_input)

    def sided(self, tensors: Mapping[str, Tensor], by: Tensor, on_input: bool) -> dict[str, Tensor]:
        """File tensors whose ΔW has its inputs or outputs multiplied by these numbers."""
        if on_input:
            inner = tensors["hada_w1_b"]
            return {**tensors, "hada_w1_b": inner * by.repeat_interleave(inner.shape[1] // len(by))}
        outer = tensors["hada_w1_a"]
        return {**tensors, "hada_w1_a": outer * (by if self.tucker else by[:, None])}

    def _product(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        """ΔW without its scale, in the shape of the weight."""
        return hadamard_delta(a1, b1, a2, b2).view(weight_shape(self.module))

    def delta_norm(self) -> Tensor:
        """‖ΔW‖, of which the factors take up a change."""
        norm: Tensor = self._product(*self._factors()).float().norm() * self.scale
        return norm

    def delta(self) -> Tensor:
        theirs = functional("loha")
        if theirs is None:
            return self._product(*(factor.float() for factor in self._factors())) * self.scale
        own = (p.float() for p in self.own().values())
        w1a, w1b, w2a, w2b, *cores = own
        t1, t2 = cores or (None, None)
        scale = torch.tensor(self.scale)
        delta: Tensor = theirs.diff_weight(w1b, w1a, w2b, w2a, t1, t2, gamma=scale, backend=EAGER)
        return delta.view(weight_shape(self.module))


@ADAPTERS.register("loha")
class Loha(Decomposed, HadamardProduct):
    """LoHa, with DoRA when asked."""

    help = "The element-wise product of two low-rank matrices: higher rank for the same file size. Rank up to 32."
    needs = frozenset({"tucker", "dora", "dora_axis"})
    sections = (TuckerOptions, DoraOptions)
    rules = DORA_RULES
    exact = frozenset({ALPHA, MAGNITUDE})
