"""LoHa: the elementwise product of two low-rank matrices, of rank up to r² (FedPara 2108.06098; LyCORIS 2309.14859)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maths.lowrank import scaled
from ..maths.rebuild import rebuilt
from .base import ADAPTERS, AdapterSpec, LayerLike, Strength, is_wide
from .direct import Direct, normal
from .library import EAGER, functional
from .tucker import TuckerOptions
from .where import in_any_block


@ADAPTERS.register("loha")
class Loha(Direct):
    """ΔW = (alpha/rank)·(w1a·w1b) ⊙ (w2a·w2b); with tucker cores t (r, r, k, k) for kernels above 1×1.

    Shapes: wa (out, r), wb (r, in·k·k); with cores wa (r, out), wb (r, in).
    """

    help = "Two low-rank matrices multiplied number by number: finer changes for the same file size. Rank up to 32."
    needs = frozenset({"tucker"})
    sections = (TuckerOptions,)
    file_tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha")
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
        module, parts = self.module, self._parts()
        geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
        if self._plain and not isinstance(strength, Tensor):
            scale = self.scale * strength
            return rebuilt(self.working_input(x), module.weight, module.bias, scale, self._product, parts, geometry)
        if not self._zero_padded:
            return super().adapted(x, strength)
        base = self._base(x)
        update = rebuilt(x.to(base.dtype), None, None, self.scale, self._product, parts, geometry)
        return base + scaled(update, strength)

    def _product(self, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, *cores: Tensor) -> Tensor:
        """ΔW without its scale, in the shape of the weight."""
        if not cores:
            return ((w1a @ w1b) * (w2a @ w2b)).view(self.module.weight.shape)
        return _cored(cores[0], w1a, w1b) * _cored(cores[1], w2a, w2b)

    def delta(self) -> Tensor:
        w1a, w1b, w2a, w2b, *cores = (part.float() for part in self._parts())
        t1, t2 = cores or (None, None)
        scale = torch.tensor(self.scale)
        delta: Tensor = functional("loha").diff_weight(w1b, w1a, w2b, w2a, t1, t2, gamma=scale, backend=EAGER)
        return delta.view(self.module.weight.shape)


def _cored(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Σ_ij core[i, j, …]·outer[i, p]·inner[j, q] as (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core, outer, inner)
