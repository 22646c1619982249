"""LoKr: a Kronecker product of a small and a larger matrix, the larger one of low rank (LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..maths.kron import kron_delta, kron_inner, kron_layer
from ..maths.lowrank import kaiming_down, scaled
from ..maths.weights import bias_of, weight_of, weight_shape
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .base import ADAPTERS, AdapterSpec, Strength, is_wide
from .direct import Direct
from .dora import DORA_RULES, Decomposed, DoraOptions
from .file_delta import ALPHA, MAGNITUDE
from .library import EAGER, functional
from .tucker import TuckerOptions
from .where import in_any_block, strength_of_one

OPTION = "option"


def _with_dora(job: Job) -> bool:
    return job[DoraOptions].use_dora


@dataclass(frozen=True)
class LokrOptions:
    """What LoKr adds to the table."""

    network_factor: int = param(
        -1,
        "Size of the small matrix: the largest divisor up to it. -1 is the most equal split, 8 a small file.",
        OPTION,
        needs="lokr",
        low=-1,
        high=4096,
    )
    network_decompose_both: bool = param(
        False, "Make the small matrix low-rank too: a smaller file.", OPTION, needs="lokr"
    )
    network_full_matrix: bool = param(
        False, "Keep both matrices whole, whatever the rank; alpha then counts as the rank.", OPTION, needs="lokr"
    )


def both_ways(job: Job, mode: ModeInfo) -> str:
    """A small matrix that is to be low-rank and whole."""
    own = job[LokrOptions]
    both = own.network_full_matrix and own.network_decompose_both
    return "has no effect together with network_full_matrix." if both else ""


def factor_pair(size: int, limit: int) -> tuple[int, int]:
    """A number as the product (small, large) by LyCORIS's rule: `limit` itself where it divides the number, else the
    most equal pair whose small part is at most `limit` (below 0: no limit).
    """
    if limit > 0 and size % limit == 0:
        small = min(limit, size // limit)
        return small, size // small
    limit = size if limit < 0 else limit
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= max(limit, 1))
    return small, size // small


def sizes(layer: Layer, spec: AdapterSpec) -> tuple[int, int, int, int]:
    """(l, m, k, n) of a layer's two matrices."""
    fan_out, fan_in = weight_shape(layer.module)[:2]
    factor = spec[LokrOptions].network_factor
    (m, n), (l, k) = factor_pair(fan_in, factor), factor_pair(fan_out, factor)  # noqa: E741
    return l, m, k, n


def low_rank(layer: Layer, spec: AdapterSpec) -> tuple[bool, bool]:
    """Whether the small and the larger matrix are products of two: where the rank is below half of their size."""
    own, rank = spec[LokrOptions], spec.rank_of(layer.kind, layer.block)
    fan_l, fan_m, fan_k, fan_n = sizes(layer, spec)
    small, larger = rank < max(fan_l, fan_m) / 2, rank < max(fan_k, fan_n) / 2
    return small and own.network_decompose_both and not own.network_full_matrix, larger and not own.network_full_matrix


class KroneckerProduct(Direct):
    """ΔW = s·kron(w1, w2), w1 (l, m), w2 (k, n[, kh, kw]); each whole or a product of two. Both whole: s = 1."""

    portable = True
    file_tensors = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", MAGNITUDE,
    )  # fmt: skip
    factors = (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_b"))
    ups = ("lokr_w2", "lokr_w2_b")

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        rank, kernel = self.rank, weight_shape(layer.module)[2:]
        fan_l, fan_m, fan_k, fan_n = sizes(layer, spec)
        small, larger = low_rank(layer, spec)
        tucker = is_wide(layer.kind) and spec[TuckerOptions].network_tucker

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(kaiming_down(shape, generator))

        if small:
            self.lokr_w1_a, self.lokr_w1_b = drawn(fan_l, rank), drawn(rank, fan_m)
        else:
            self.lokr_w1 = drawn(fan_l, fan_m)
        if not larger:
            self.lokr_w2 = nn.Parameter(torch.zeros(fan_k, fan_n, *kernel))
        elif tucker:
            self.lokr_t2, self.lokr_w2_a = drawn(rank, rank, *kernel), drawn(rank, fan_k)
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, fan_n))
        else:
            self.lokr_w2_a = drawn(fan_k, rank)
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, fan_n * math.prod(kernel)))
        self._piece = (fan_k, fan_n, *kernel)
        if {"lokr_w1", "lokr_w2"} <= set(self._parameters):
            self.alpha, self.scale = float(rank), 1.0

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        own, tucker = spec[LokrOptions], spec[TuckerOptions].network_tucker
        named = {
            "factor": own.network_factor, "decompose_both": own.network_decompose_both,
            "full_matrix": own.network_full_matrix, "use_tucker": tucker,
        }  # fmt: skip
        return {name: str(value) for name, value in named.items()}

    def constants(self) -> dict[str, float]:
        return {ALPHA: self.alpha}

    def _pair(self) -> tuple[Tensor, Tensor]:
        """w1 (l, m) and w2 (k, n[, kh, kw]), without the scale."""
        own = self._parameters
        w1: Tensor | None = own.get("lokr_w1")
        w2: Tensor | None = own.get("lokr_w2")
        if w1 is None:
            w1 = self.lokr_w1_a @ self.lokr_w1_b
        if w2 is None and "lokr_t2" in own:
            w2 = torch.einsum("ij...,ip,jq->pq...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        elif w2 is None:
            w2 = (self.lokr_w2_a @ self.lokr_w2_b).view(self._piece)
        return w1, w2

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        module = self.module
        if self._plain:
            x, scale = self.working_input(x), self.scale * strength
            geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
            return kron_layer(x, weight_of(module), bias_of(module), *self._pair(), scale, geometry)
        base = self._base(x)
        return base + scaled(self.update(x.to(base.dtype)), strength)

    def update(self, x: Tensor) -> Tensor:
        """ΔW·x at strength 1, without bias."""
        module = self.module
        if not self._zero_padded:
            return self._operate(x, KroneckerProduct.delta(self).to(x.dtype))
        geometry = None if self.kind == "linear" else (module.stride, module.padding, module.dilation)
        return kron_layer(x, None, None, *self._pair(), self.scale, geometry)

    def square_norms(self, on_input: bool) -> Tensor:
        """‖W + ΔW‖² − ‖W‖² for each input or output: 2·⟨W, ΔW⟩ + s²·‖w1‖²·‖w2‖², column by column or row by row."""
        w1, w2 = (factor.float() for factor in self._pair())
        cross = kron_inner(weight_of(self.module, self._casts_to), w1, w2, on_input)
        mine = 0 if on_input else 1  # the axis that is summed over
        one, two = w1.square().sum(mine), w2.reshape(*w2.shape[:2], -1).square().sum(2).sum(mine)
        return 2 * self.scale * cross + self.scale**2 * torch.outer(one, two).flatten()

    def delta(self) -> Tensor:
        theirs = functional("lokr")
        if theirs is None:
            one, two = (factor.float() for factor in self._pair())
            return kron_delta(one, two).view(weight_shape(self.module)) * self.scale
        own = {name: p.float() for name, p in self._parameters.items() if p is not None}
        w1, w1a, w1b = (own.get(f"lokr_w1{end}") for end in ("", "_a", "_b"))
        w2, w2a, w2b = (own.get(f"lokr_w2{end}") for end in ("", "_a", "_b"))
        if w2b is not None and "lokr_t2" not in own:
            w2b = w2b.view(w2b.shape[0], *self._piece[1:])
        weights = (w1, w1a, w1b, w2, w2a, w2b, own.get("lokr_t2"))
        delta: Tensor = theirs.kron_weight(*weights, scale=self.scale, backend=EAGER)
        return delta.view(weight_shape(self.module))

    def delta_norm(self) -> Tensor:
        """‖kron(w1, w2)‖ = ‖w1‖·‖w2‖."""
        w1, w2 = self._pair()
        norm: Tensor = w1.float().norm() * w2.float().norm() * self.scale
        return norm


@ADAPTERS.register("lokr")
class Lokr(Decomposed, KroneckerProduct):
    """LoKr, with DoRA when asked; its file can then hold no strength, which scales rows or columns one by one."""

    help = "A Kronecker product of two small matrices: changes of high rank in a very small file."
    needs = frozenset({"tucker", "lokr", "dora", "dora_axis"})
    sections = (TuckerOptions, LokrOptions, DoraOptions)
    rules = (
        *DORA_RULES,
        Rule(("network_decompose_both", "network_full_matrix"), both_ways, warning=True),
        strength_of_one("lokr", "the two matrices cannot take up a DoRA at part of its strength", _with_dora),
    )
    exact = frozenset({ALPHA, MAGNITUDE})

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.scalable = not self.decomposed

    @classmethod
    def shared(cls, layers: Sequence[Layer], spec: AdapterSpec, tell: Callable[[str], None]) -> None:
        """Tells which option changes nothing, for no layer has a matrix that the rank would split."""
        small = any(low_rank(layer, spec)[0] for layer in layers)
        larger = any(low_rank(layer, spec)[1] for layer in layers if is_wide(layer.kind))
        wanted = {
            "network_decompose_both": spec[LokrOptions].network_decompose_both and not small,
            "network_tucker": spec[TuckerOptions].network_tucker and not larger,
        }
        for name in (name for name, idle in wanted.items() if idle):
            tell(
                f"{name} changes nothing: every matrix that it could split stays whole. It needs a lower rank than"
                f" {spec.rank}, and not network_full_matrix."
            )

    def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """A Kronecker product whose rows or columns are scaled one by one is none."""
        if MAGNITUDE in tensors and factor != 1.0:
            raise self.no_place_for_strength()
        return super().rescaled(tensors, factor)
