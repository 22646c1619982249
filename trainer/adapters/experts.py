"""Experts after EffiLoRA (2512.00878): a down matrix for all layers of a width, several up matrices mixed by gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import LowRank, kaiming_down, per_sample
from ..maths.weights import weight_shape
from ..params.spaces import EXPERT_RULES, ExpertParams
from .base import ADAPTERS, AdapterSpec, Groups, Strength
from .dora import DoraOptions
from .factored import Factored
from .plain_lora import Lora

SPREAD = 0.1
"""How far the experts start apart, in units of a LoRA's down matrix."""
KEPT_ROWS, KEPT_INPUTS = 1024, 64


class Common(nn.Module):
    """A down matrix (r, in[, k, k]) that several layers share."""

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down)


@dataclass(frozen=True)
class Seen:
    """What a routed layer met in its last training step: D·x (n, r), the gates (n, E), inputs of the router (m, in)."""

    middle: Tensor
    gates: Tensor
    inputs: Tensor


@ADAPTERS.register("experts", "effilora")
class Experts(Factored):
    """ΔW = (alpha/rank)·(Σ_e g_e·B_e)·A. A is one matrix for all layers of a part with the same input; the B_e differ.

    The experts start at ±R_e, so that their sum is 0 while each has a direction of its own: experts that start alike
    stay alike. With network_routing constant the gates g = softmax(learned numbers) and the sum is one matrix. With
    input, g depends on x as well (tokens in linear layers, pictures in convolutions) until `heat` has fallen from 1 to
    0; a file written before that holds the least-squares fold over the inputs of the last step. The paper's reducer,
    which only saves time, is left out.
    """

    help = "Several up matrices per layer, mixed by learned gates, over one shared down matrix. Saved as a LoRA."
    needs = frozenset({"dora", "experts"})
    sections = (ExpertParams, DoraOptions)
    rules = EXPERT_RULES
    factors: ClassVar[Groups] = (("experts",),)
    ups: ClassVar[tuple[str, ...]] = ("experts",)
    downs: ClassVar[tuple[str, ...]] = ("common.down",)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        own, width = spec[ExpertParams], (layer.part, self.rank, self.kernel)
        shared = cast("dict[object, Common]", spec.shared)
        if width not in shared:
            shared[width] = Common(kaiming_down((self.rank, *self.kernel), generator))
        self.common: Common = shared[width]
        self.heat = 1.0
        self.seen: Seen | None = None
        start = SPREAD * kaiming_down((own.num_experts // 2 * self.fan_out, self.rank), generator)
        start = start.view(-1, 1, self.fan_out, self.rank)
        paired = torch.cat([start, -start], dim=1).flatten(0, 1)
        rest = torch.zeros(own.num_experts % 2, self.fan_out, self.rank)
        self.experts = nn.Parameter(torch.cat([paired, rest]))
        if own.num_experts > 1:
            self.gates = nn.Parameter(torch.zeros(own.num_experts))
            if own.network_routing == "input":
                self.router = nn.Parameter(torch.zeros(own.num_experts, weight_shape(layer.module)[1]))

    @classmethod
    def shared(cls, layers: Sequence[Layer], spec: AdapterSpec, tell: Callable[[str], None]) -> object:
        return {}

    @property
    def routed(self) -> bool:
        """Whether the gates depend on the input now."""
        return "router" in self._parameters and self.heat > 0

    def mixture(self) -> Tensor:
        """The gates without the input, (E,), summing to 1."""
        return self.gates.softmax(0) if len(self.experts) > 1 else torch.ones_like(self.experts[:, 0, 0])

    def product(self) -> tuple[Tensor, Tensor]:
        if self.routed and self.seen is not None:
            return self.common.down, self._folded(self.seen)[0]
        gates, experts = _of_pairs(self.mixture(), 0), _of_pairs(self.experts, 0, 0.5)
        return self.common.down, (gates @ experts.flatten(1)).view(self.fan_out, self.rank)

    def as_lora(self) -> LowRank:
        if not (self.routed and self.seen is not None):
            return LowRank(*self.pair(), self.scale)
        up, error = self._folded(self.seen)
        return LowRank(self.common.down, self.by_rows(up), self.scale, error)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        if not self.routed:
            return super().adapted(x, strength)
        base = self._base(x)
        return base + self._routed(x.to(base.dtype), self.scale * strength)

    def thinned(self, x: Tensor, strength: float | Tensor) -> Tensor:
        if not self.routed:
            return super().thinned(x, strength)
        return self.adapted(x, strength)

    def _routed(self, x: Tensor, scale: float | Tensor) -> Tensor:
        """scale·Σ_e g_e(x)·B_e·A·x, the experts side by side in one product."""
        middle = self.dropped(self._operate(x, self.common.down.to(x.dtype)))
        linear = self.kind == "linear"
        rows = middle if linear else middle.flatten(2).transpose(1, 2)
        asked = x if linear else x.mean(dim=(2, 3))[:, None]
        gates = self._gates(asked).expand(*rows.shape[:-1], -1)
        if self.draws.on and type(rows) is Tensor:  # a fake tensor, in a prediction of memory, holds nothing
            kept = ((rows, KEPT_ROWS), (gates, KEPT_ROWS), (asked, KEPT_INPUTS))
            self.seen = Seen(*(_some_rows(tensor.detach().flatten(0, -2), most) for tensor, most in kept))
        wide = (_of_pairs(gates, -1)[..., None] * rows[..., None, :]).flatten(-2)
        experts = _of_pairs(self.experts, 0, 0.5).permute(1, 0, 2).flatten(1)
        update = functional.linear(wide, self.by_rows(experts).to(x.dtype))
        if not linear:
            update = update.transpose(1, 2).unflatten(2, middle.shape[2:])
        return update * (per_sample(scale, update) if isinstance(scale, Tensor) else scale)

    def balance(self) -> Tensor | None:
        """E·Σ_e (mean gate)² − 1 of the last step's inputs (2101.03961, eq. 4): 0 when all experts are used alike.

        None where the gates do not depend on the input. Differentiable in what the gates are made of.
        """
        if not self.routed or self.seen is None:
            return None
        mean = self._gates(self.seen.inputs).float().mean(0)
        return len(mean) * mean.square().sum() - 1

    def _gates(self, x: Tensor) -> Tensor:
        """The gates (…, E) for inputs (…, in)."""
        return (self.gates.to(x.dtype) + self.heat * functional.linear(x, self.router.to(x.dtype))).softmax(-1)

    def _folded(self, seen: Seen) -> tuple[Tensor, float]:
        """(B*, relative error): B*·A is nearest to what the routed layer did to the inputs seen, by least squares."""
        middle, gates = seen.middle.float(), seen.gates.float()
        inverse = torch.linalg.pinv(middle.T @ middle, hermitian=True)
        ups = self.experts.float()
        up = sum(ups[e] @ ((middle * gates[:, e : e + 1]).T @ middle @ inverse) for e in range(len(ups)))
        wanted = torch.einsum("ne,nr,eor->no", gates, middle, ups)
        size = wanted.norm()
        rest = (wanted - middle @ up.T).norm().detach()
        return up, float(rest / size.detach()) if bool(size > 0) else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The plain LoRA as it is: rows scaled for each layer would no longer be one shared matrix."""
        return Lora.tensors(self)

    def fit(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The file's down matrix for all, its up matrix in every expert, which keep their distances to each other."""
        if len(down) != self.rank:
            raise AdapterError(
                f"{self.key}: the file has rank {len(down)}, this network has rank {self.rank}. Set network_rank to"
                f" {len(down)}, or choose a file of rank {self.rank}."
            )
        ups = self.experts.detach().float().cpu()
        own = {"common.down": down.view(self.common.down.shape), "experts": ups - ups.mean(0) + up}
        mixing = [name for name in ("gates", "router") if name in self._parameters]
        return {**own, **{name: torch.zeros(self.get_parameter(name).shape) for name in mixing}}


def _of_pairs(numbers: Tensor, dim: int, factor: float = 1.0) -> Tensor:
    """Sums and differences of the pairs along a dimension, times a factor; what has no partner comes last, as it is.

    Σ_e g_e·B_e is the same in these coordinates, with factor 1 for the one and ½ for the other: for a pair it is
    (g_1 + g_2)·½(B_1 + B_2) + (g_1 − g_2)·½(B_1 − B_2). At the start B_1 + B_2 and g_1 − g_2 are exactly 0, and so is
    the sum, however a processor rounds.
    """
    rows = numbers.movedim(dim, 0)
    paired = len(rows) // 2 * 2
    one, two = rows[0:paired:2], rows[1:paired:2]
    return torch.cat([(one + two) * factor, (one - two) * factor, rows[paired:]]).movedim(0, dim)


def _some_rows(rows: Tensor, most: int) -> Tensor:
    """At most `most` rows, evenly spread."""
    return rows[:: -(-len(rows) // most)].clone()
