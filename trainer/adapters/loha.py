"""LoHa: the elementwise product of two low-rank matrices, of rank up to r² (FedPara 2108.06098; LyCORIS 2309.14859)."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..maths.lowrank import scaled
from ..maths.rebuild import rebuilt
from .base import ADAPTERS, AdapterSpec, LayerLike, Strength, is_wide
from .direct import ALPHA, Direct, normal
from .dora import MAGNITUDE, Decomposed, DoraOptions
from .library import EAGER, functional
from .tucker import TuckerOptions
from .where import in_any_block


class HadamardProduct(Direct):
    """ΔW = (alpha/rank)·(w1a·w1b) ⊙ (w2a·w2b); with tucker cores t (r, r, k, k) for kernels above 1×1.

    Shapes: wa (out, r), wb (r, in·k·k); with cores wa (r, out), wb (r, in).
    """

    portable = True
    file_tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", MAGNITUDE)
    factors = (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",))
    ups = ("hada_w1_a", "hada_w2_a")

    def __init__(self, layer: LayerLike, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        fan_out, fan_in, *kernel = layer.module.weight.shape
        self.tucker = is_wide(layer.kind) and spec[TuckerOptions].network_tucker
        outer = (self.rank, fan_out) if self.tucker else (fan_out, self.rank)
        inner = (self.rank, fan_in if self.tucker else layer.module.weight[0].numel())
        self.hada_w1_a, self.hada_w1_b = normal(outer, 0.1, generator), normal(inner, 1.0, generator)
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.zeros(outer)), normal(inner, 1.0, generator)
        if self.tucker:
            core = (self.rank, self.rank, *kernel)
            self.hada_t1, self.hada_t2 = normal(core, 0.1, generator), normal(core, 0.1, generator)

    @classmethod
    def covers(cls, layer: LayerLike, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    def _parts(self) -> tuple[Tensor, ...]:
        """The parameters in the order of `_product`."""
        return tuple(self._parameters[name] for name in self.file_tensors[: 6 if self.tucker else 4])  # type: ignore[misc]

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        module = self.module
        if self._plain and not isinstance(strength, Tensor):
            x, scale, parts = self.working_input(x), self.scale * strength, self._parts()
            geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
            return rebuilt(x, module.weight, module.bias, scale, self._product, parts, geometry)
        base = self._base(x)
        return base + scaled(self.update(x.to(base.dtype)), strength)

    def update(self, x: Tensor) -> Tensor:
        """ΔW·x at strength 1, without bias."""
        module = self.module
        if not self._zero_padded:
            return self._operate(x, self._product(*self._parts()).to(x.dtype) * self.scale)
        geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
        return rebuilt(x, None, None, self.scale, self._product, self._parts(), geometry)

    def expanded(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """ΔW of file tensors, float32."""
        parts = (tensors[name].float() for name in self.file_tensors if name in self.own())
        return self._product(*parts) * self.file_scale(tensors)

    def sided(self, tensors: Mapping[str, Tensor], by: Tensor, on_input: bool) -> dict[str, Tensor]:
        """File tensors whose ΔW has its inputs or outputs multiplied by these numbers."""
        if on_input:
            inner = tensors["hada_w1_b"]
            return {**tensors, "hada_w1_b": inner * by.repeat_interleave(inner.shape[1] // len(by))}
        outer = tensors["hada_w1_a"]
        return {**tensors, "hada_w1_a": outer * (by if self.tucker else by[:, None])}

    def _product(self, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, *cores: Tensor) -> Tensor:
        """ΔW without its scale, in the shape of the weight."""
        if not cores:
            return ((w1a @ w1b) * (w2a @ w2b)).view(self.module.weight.shape)
        return _cored(cores[0], w1a, w1b) * _cored(cores[1], w2a, w2b)

    def delta_norm(self) -> Tensor:
        """‖ΔW‖, of which the factors take up a change."""
        return self._product(*self._parts()).float().norm() * self.scale

    def delta(self) -> Tensor:
        w1a, w1b, w2a, w2b, *cores = (part.float() for part in self._parts())
        theirs = functional("loha")
        if theirs is None:
            return self._product(w1a, w1b, w2a, w2b, *cores) * self.scale
        t1, t2 = cores or (None, None)
        scale = torch.tensor(self.scale)
        delta: Tensor = theirs.diff_weight(w1b, w1a, w2b, w2a, t1, t2, gamma=scale, backend=EAGER)
        return delta.view(self.module.weight.shape)


@ADAPTERS.register("loha")
class Loha(Decomposed, HadamardProduct):
    """LoHa, with DoRA when asked."""

    help = "Two low-rank matrices multiplied number by number: finer changes for the same file size. Rank up to 32."
    needs = frozenset({"tucker", "dora", "dora_axis"})
    sections = (TuckerOptions, DoraOptions)
    exact = frozenset({ALPHA, MAGNITUDE})


def _cored(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Σ_ij core[i, j, …]·outer[i, p]·inner[j, q] as (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core, outer, inner)
