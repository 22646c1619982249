"""LoRA on linear and 1×1 convolution layers (2106.09685), and LoCon: also the convolutions of the residual blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import LowRank, cored, kaiming_down, low_rank_conv, low_rank_delta, low_rank_linear, scaled
from ..maths.weights import weight_of, weight_shape
from ..params.core import Network
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.network import DIFFERENCE_INITS, NetworkOptions
from ..params.rules import Rule
from .base import (
    ADAPTERS,
    Adapter,
    AdapterSpec,
    Strength,
    is_wide,
)
from .dora import DORA_RULES, Decomposed, DoraOptions
from .file_delta import ALPHA, DOWN, MAGNITUDE, MID, UP, alpha_of
from .timesteps import RULES as TIMESTEP_RULES
from .timesteps import TimestepOptions
from .tucker import TuckerOptions
from .where import ignores, in_any_block, in_transformer


def tucker_start(job: Job, mode: ModeInfo) -> str:
    """A start that is given as two matrices, for kernels kept in three parts."""
    init, kind = job[NetworkOptions].network_init, job[Network].network_type
    if init == "default" or not job[TuckerOptions].network_tucker or ADAPTERS.canonical(kind) != "c3lier":
        return ""
    return f"cannot begin as network_init {init}; switch one of the two off."


class Lora(Adapter):
    """ΔW = (alpha/rank)·up·down, through a fused forward and backward. What lierla, c3lier and others are made of."""

    file_tensors = (DOWN, UP, ALPHA)
    network_module = "networks.lora"
    factors = (("down",), ("up",))
    ups, downs = ("up",), ("down",)
    inits = frozenset({*DIFFERENCE_INITS, "instant"})
    counted = False
    lowest = 0

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        fan_out, *rest = weight_shape(layer.module)
        self.down = nn.Parameter(kaiming_down((self.rank, *rest), generator))
        self.up = nn.Parameter(torch.zeros(fan_out, self.rank))
        self.lowest = spec[TimestepOptions].network_timestep_rank if layer.part == "unet" else 0
        self.counted = self.options.network_init in DIFFERENCE_INITS & self.inits
        if self.counted:
            self.register_buffer("down0", self.down.detach().clone())
            self.register_buffer("up0", torch.zeros(fan_out, self.rank))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW = scale·U·D: D (r, in[, k, k]) and U (out, r); of twice the rank when it is counted from a
        start, for U·D − U₀·D₀ = [U, −U₀]·[D; D₀].
        """
        parameters = self._parameters
        if self.counted:
            return torch.cat([parameters["down"], self.down0]), torch.cat([parameters["up"], -self.up0], 1)
        return parameters["down"], parameters["up"]  # type: ignore[return-value]

    def _sides(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The pair of ΔW/scale, or the one it is less the one of the start; both draw their dropout alike."""
        return ((self.down, self.up), (self.down0, self.up0)) if self.counted else (self.pair(),)

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_transformer(layer)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        scale = self.scale * strength
        module = self._held[0]
        if not self._plain:
            return self._on_top_of(self._base(x), x, scale)
        down, up = self.pair()
        active = self.active_ranks()
        if active is not None:
            scale = active.repeat(1, len(down) // self.rank) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        x = self.working_input(x)
        if self.kind == "linear":
            return low_rank_linear(x, weight_of(module), module.bias, down, up, scale)
        geometry = (module.stride, module.padding, module.dilation)
        return low_rank_conv(x, weight_of(module), module.bias, down, up, scale, geometry)

    def thinned(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """Dropout as in kohya's trainer: of the rank-r middle, and of whole ranks."""
        return self._on_top_of(self._base(x), x, self.scale * strength)

    def _on_top_of(self, base: Tensor, x: Tensor, scale: float | Tensor) -> Tensor:
        """base + ΔW·x, where the layer beneath computes in its own way (for instance with another adapter)."""
        return base + scaled(self._sum(x.to(base.dtype)), scale)

    def active_ranks(self) -> Tensor | None:
        """T-LoRA: (B, rank) of 0 and 1, in a training step and while the UNet predicts."""
        return self.timesteps.mask(self.rank, self.lowest) if self.lowest and self.draws.on else None

    def update(self, x: Tensor) -> Tensor:
        """ΔW·x at strength 1, without bias."""
        return self._sum(x) * self.scale

    def _sum(self, x: Tensor) -> Tensor:
        """ΔW·x without the scale, with the dropout of this step."""
        first, *rest = (self._update(x, *side) for side in self._sides())
        return first - rest[0] if rest else first

    def _update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """U·D·x with the dropout of this step."""
        middle = self.dropped(self._operate(x, down.to(x.dtype)))
        active = self.active_ranks()
        if active is not None:
            after = (1,) * (middle.ndim - 2)
            shape = (len(active), *after, -1) if self.kind == "linear" else (len(active), -1, *after)
            middle = middle * active.to(middle.dtype).view(shape)
        kept = self.kept_ranks(up.shape[1])
        up = (up if kept is None else up * kept.to(up)).to(x.dtype)
        if self.kind == "linear":
            return functional.linear(middle, up)
        return functional.conv2d(middle, up[:, :, None, None])

    @torch.no_grad()
    def start(self, down: Tensor, up: Tensor) -> None:
        for tensor, given in ((self.down, down), (self.down0, down), (self.up, up), (self.up0, up)):
            tensor.copy_(given.view(tensor.shape))

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
        alpha = torch.tensor(self.scale * len(down) if self.counted else self.alpha)
        return {DOWN: down, UP: up.view(*up.shape, *(1,) * (down.ndim - 2)), ALPHA: alpha}

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

    file_tensors = (DOWN, UP, MID, ALPHA)
    factors = (("down",), ("mid",), ("up",))

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


@ADAPTERS.register("lierla", "lora")
class Lierla(Decomposed, Lora):
    """LoRA on the linear layers and 1×1 convolutions of transformer blocks and text encoders."""

    help = "Plain LoRA on the attention blocks: small, fast, read by every WebUI. Rank 4 to 128."
    needs = frozenset({"dora", "dora_axis", "timestep_rank"})
    sections = (DoraOptions, TimestepOptions)
    rules = (*TIMESTEP_RULES, *DORA_RULES, *ignores("lierla", "network_conv_rank", "network_conv_alpha"))
    file_tensors = (DOWN, UP, ALPHA, MAGNITUDE)
    exact = frozenset({ALPHA, MAGNITUDE})


@ADAPTERS.register("c3lier", "locon")
class Locon(Decomposed, Convolved):
    """LoRA also on the convolutions, samplers and time projections of the UNet."""

    help = "LoRA on the convolutions too (LoCon): also learns textures and style. Rank up to 64, alpha 1 or less."
    needs = frozenset({"dora", "dora_axis", "timestep_rank", "tucker"})
    sections = (DoraOptions, TimestepOptions, TuckerOptions)
    rules = (*TIMESTEP_RULES, *DORA_RULES, Rule(("network_tucker", "network_init"), tucker_start))
    file_tensors = (DOWN, UP, MID, ALPHA, MAGNITUDE)
    exact = frozenset({ALPHA, MAGNITUDE})

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        return {"conv_dim": str(spec.rank_of("conv3x3")), "conv_alpha": str(spec.alpha_of("conv3x3"))}
