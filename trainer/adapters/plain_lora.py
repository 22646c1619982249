"""Plain LoRA, ΔW = (alpha/rank)·U·D (2106.09685): what lierla, c3lier and others are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import LowRank, cored, kaiming_down, low_rank_conv, low_rank_delta, low_rank_linear, scaled
from ..maths.weights import bias_of, weight_of, weight_shape
from .base import Adapter, AdapterSpec, Groups, Strength, is_wide
from .file_delta import ALPHA, DOWN, MID, UP, alpha_of
from .tucker import TuckerOptions
from .where import in_transformer


class Lora(Adapter):
    """ΔW = (alpha/rank)·up·down, through a fused forward and backward.

    What wraps it (`timesteps`, `difference_start`) overrides `pair`, `fused`, `_sum` or `middle`.
    """

    file_tensors: ClassVar[tuple[str, ...]] = (DOWN, UP, ALPHA)
    network_module = "networks.lora"
    factors: ClassVar[Groups] = (("down",), ("up",))
    ups: ClassVar[tuple[str, ...]] = ("up",)
    downs: ClassVar[tuple[str, ...]] = ("down",)
    inits: ClassVar[frozenset[str]] = frozenset({"instant"})

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        fan_out, *rest = weight_shape(layer.module)
        self.down = nn.Parameter(kaiming_down((self.rank, *rest), generator))
        self.up = nn.Parameter(torch.zeros(fan_out, self.rank))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW = scale·U·D: D (r, in[, k, k]) and U (out, r)."""
        own = self._parameters  # faster than attributes of a module
        return own["down"], own["up"]  # type: ignore[return-value]

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_transformer(layer)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        scale = self.scale * strength
        if not self._plain:
            return self._on_top_of(self._base(x), x, scale)
        return self.fused(x, *self.pair(), scale)

    def fused(self, x: Tensor, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
        """W·x + b + scale·U·D·x in one operation; the scale a number, or (B,), or (B, ranks of D)."""
        module, x = self._held[0], self.working_input(x)
        if self.kind == "linear":
            return low_rank_linear(x, weight_of(module), bias_of(module), down, up, scale)
        geometry = (module.stride, module.padding, module.dilation)
        return low_rank_conv(x, weight_of(module), bias_of(module), down, up, scale, geometry)

    def thinned(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """Dropout as in kohya's trainer: of the rank-r middle, and of whole ranks."""
        return self._on_top_of(self._base(x), x, self.scale * strength)

    def _on_top_of(self, base: Tensor, x: Tensor, scale: float | Tensor) -> Tensor:
        """base + ΔW·x, where the layer beneath computes in its own way (for instance with another adapter)."""
        return base + scaled(self._sum(x.to(base.dtype)), scale)

    def update(self, x: Tensor) -> Tensor:
        """ΔW·x at strength 1, without bias."""
        return self._sum(x) * self.scale

    def _sum(self, x: Tensor) -> Tensor:
        """ΔW·x without the scale, with the dropout of this step."""
        return self._update(x, *self.pair())

    def _update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """U·D·x with the dropout of this step."""
        middle = self.middle(x, down)
        kept = self.kept_ranks(up.shape[1])
        up = (up if kept is None else up * kept.to(up)).to(x.dtype)
        if self.kind == "linear":
            return functional.linear(middle, up)
        return functional.conv2d(middle, up[:, :, None, None])

    def middle(self, x: Tensor, down: Tensor) -> Tensor:
        """D·x, (…, r) or (B, r, h, w), with the dropout of this step."""
        return self.dropped(self._operate(x, down.to(x.dtype)))

    def delta(self) -> Tensor:
        return low_rank_delta(*self.pair(), self.scale)

    def as_lora(self) -> LowRank | None:
        return LowRank(*self.pair(), self.scale)

    def delta_norm(self) -> Tensor:
        down, up = (factor.float().flatten(1) for factor in self.pair())
        square = ((up.T @ up) * (down @ down.T)).sum()  # ‖U·D‖² = tr(UᵀU·DDᵀ), without the product itself
        return square.clamp(min=0).sqrt() * self.scale

    def square_norms(self, on_input: bool) -> Tensor:
        """‖W + ΔW‖² − ‖W‖² for each input or output, from W·Dᵀ or Uᵀ·W and the small products of the factors alone."""
        down, up = (factor.float().flatten(1) for factor in self.pair())
        weight = weight_of(self.module, self._casts_to).flatten(1)
        if on_input:
            other = 2 * (up.T.to(weight.dtype) @ weight).float() + self.scale * (up.T @ up) @ down
            return self.scale * (down * other).sum(0).view(weight_shape(self.module)[1], -1).sum(1)
        other = 2 * (weight @ down.T.to(weight.dtype)).float() + self.scale * up @ (down @ down.T)
        return self.scale * (up * other).sum(1)

    def sided(self, tensors: Mapping[str, Tensor], by: Tensor, on_input: bool) -> dict[str, Tensor]:
        """File tensors whose ΔW has its inputs or outputs multiplied by these numbers."""
        name, shape = (DOWN, (1, -1)) if on_input else (UP, (-1, 1))
        return {**tensors, name: tensors[name] * by.view(*shape, *(1,) * (tensors[name].ndim - 2))}

    def tensors(self) -> dict[str, Tensor]:
        down, up = (factor.detach() for factor in self.pair())
        tail = (1,) * (down.ndim - 2)
        return {DOWN: down, UP: up.view(*up.shape, *tail), ALPHA: torch.tensor(self.alpha)}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        found = self.named(tensors)
        rank = found[DOWN].shape[0]
        if rank != self.rank:
            setting = "network_conv_rank" if is_wide(self.kind) else "network_rank"
            raise AdapterError(
                f"{self.key}: the file has rank {rank}, this network has rank {self.rank}."
                f" Set {setting} to {rank}, or choose a file of rank {self.rank}."
            )
        given = alpha_of(found)
        alpha = float(rank) if given is None else given
        found = self.rescaled({DOWN: found[DOWN].float(), UP: found[UP].float()}, factor * alpha / self.alpha)
        return {"down": self._shaped(DOWN, found[DOWN], self.down), "up": self._shaped(UP, found[UP], self.up)}

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a plain LoRA. Raises AdapterError when they are something else."""
        found = dict(tensors)
        strange = sorted(set(found) - set(self.file_tensors))
        lacking = [name for name in (DOWN, UP) if name not in found]
        if strange or lacking:
            raise AdapterError(
                f"{self.key} in the file has the tensors {', '.join(sorted(tensors))}, but a plain LoRA has"
                f" {', '.join(self.file_tensors)}. Choose the network_type the file was made with."
            )
        return found

    def _shaped(self, name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A file tensor in a parameter's shape; (r, in) and (r, in, 1, 1) are the same thing."""
        if [size for size in tensor.shape if size > 1] != [size for size in parameter.shape if size > 1]:
            raise AdapterError(
                f"{self.key}.{name} is {tuple(tensor.shape)} in the file, and this model's layer needs"
                f" {tuple(parameter.shape)}. The file was made for another kind of base model."
            )
        return tensor.reshape(parameter.shape)

    def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """√|factor| on both factors, its sign on the up side, so that neither leaves the range of fp16 by itself."""
        if factor == 1.0:
            return dict(tensors)
        root = math.sqrt(abs(factor))
        return {**tensors, DOWN: tensors[DOWN] * root, UP: tensors[UP] * math.copysign(root, factor)}


class Convolved(Lora):
    """LoRA that can keep convolution kernels in Tucker form: ΔW[o, i, y, x] = s·Σ up[o, a]·mid[a, b, y, x]·down[b, i].

    That is the LoRA whose D is mid·down.
    """

    file_tensors: ClassVar[tuple[str, ...]] = (DOWN, UP, MID, ALPHA)
    factors: ClassVar[Groups] = (("down",), ("mid",), ("up",))

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.tucker = is_wide(layer.kind) and spec[TuckerOptions].network_tucker
        if self.tucker:
            fan_in, *kernel = weight_shape(layer.module)[1:]
            self.down = nn.Parameter(kaiming_down((self.rank, fan_in, *(1 for _ in kernel)), generator))
            self.mid = nn.Parameter(kaiming_down((self.rank, self.rank, *kernel), generator))

    def pair(self) -> tuple[Tensor, Tensor]:
        return (cored(self.mid, self.down), self.up) if self.tucker else super().pair()

    def tensors(self) -> dict[str, Tensor]:
        plain = super().tensors()
        return {**plain, DOWN: self.down.detach(), MID: self.mid.detach()} if self.tucker else plain

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        found = self.named(tensors)
        if self.tucker:
            if MID not in found:
                raise AdapterError(f"{self.key} in the file has no {MID}. Switch network_tucker off.")
            core = self._shaped(MID, found.pop(MID), self.mid).float()
            return {**super().read(found, factor), "mid": core}
        if MID in found:  # a LoRA like any other, its core multiplied out
            found[DOWN] = cored(found.pop(MID).float(), found[DOWN].float())
        return super().read(found, factor)
