"""EH: one small block used for every group of channels, as in sd-trainer's network of 2023."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import scaled
from ..maths.weights import weight_shape
from ..params.field import param
from .base import ADAPTERS, AdapterSpec, Strength
from .direct import Direct
from .file_delta import ALPHA
from .where import ignores, in_transformer

W1, W2, OLD = "lokr_w1", "lokr_w2", "linear.weight"


@dataclass(frozen=True)
class EhOptions:
    """What EH adds to the table."""

    network_groups: int = param(
        4, "Groups of channels that share one block; more make a smaller file.", "option", needs="eh", low=1, high=64
    )


@ADAPTERS.register("eh")
class Eh(Direct):
    """ΔW is block-diagonal, n times the same block (out/n, in/n), which starts at 0: kron(1ₙ, block).

    Written as the LoKr it is (w1 = 1ₙ, w2 = block, scale 1), which A1111, Forge and ComfyUI read. Linear layers of the
    UNet whose sizes n divides.
    """

    help = (
        "One small matrix shared by groups of channels, on the linear layers of the UNet. Rank and alpha have no"
        " effect."
    )
    needs = frozenset({"eh"})
    sections = (EhOptions,)
    rules = ignores("eh", "network_rank", "network_alpha", "network_conv_rank", "network_conv_alpha")
    portable = True
    file_tensors = (W1, W2, ALPHA)
    ranked = False
    factors = (("block_weight",),)
    named: ClassVar[Mapping[str, str]] = {"block_weight": W2}

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.groups = spec[EhOptions].network_groups
        fan_out, fan_in = weight_shape(layer.module)
        self.block_weight = nn.Parameter(torch.zeros(fan_out // self.groups, fan_in // self.groups))

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        groups = spec[EhOptions].network_groups
        if layer.part != "unet" or layer.kind != "linear" or not in_transformer(layer):
            return False
        return all(size % groups == 0 for size in weight_shape(layer.module))

    def tensors(self) -> dict[str, Tensor]:
        return {W1: torch.eye(self.groups), W2: self.block_weight.detach(), ALPHA: torch.tensor(1.0)}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        if set(tensors) == {OLD}:
            return super().read({W2: tensors[OLD]}, factor)
        mixing = tensors.get(W1)
        own = {name: tensor for name, tensor in tensors.items() if name not in (W1, ALPHA)}
        if mixing is None:
            return super().read(own, factor)
        scale = float(mixing.float().diagonal().mean()) if mixing.shape == (self.groups,) * 2 else 0.0
        if not scale or not torch.allclose(mixing.float(), scale * torch.eye(self.groups), atol=1e-3 * abs(scale)):
            raise AdapterError(
                f"{self.key}: {W1} of the file is not one block for {self.groups} groups. Set network_groups to what"
                " the file was made with, or network_type to lokr."
            )
        return super().read(own, factor * scale)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        base = self._base(x)
        pieces: Tensor = x.to(base.dtype).unflatten(-1, (self.groups, -1))
        update = functional.linear(pieces, self.block_weight.to(base.dtype)).flatten(-2)
        return base + scaled(update, strength)

    def delta(self) -> Tensor:
        delta: Tensor = torch.block_diag(*[self.block_weight.float()] * self.groups)
        return delta
