"""Starts from the model itself (PiSSA, MiLoRA, OLoRA, LoRA-GA): ΔW counts from where the factors began."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Layer
from ..params.network import DIFFERENCE_INITS
from .base import AdapterSpec, Strength
from .file_delta import ALPHA, DOWN
from .plain_lora import Lora


class DifferenceStart(Lora):
    """Put before a LoRA, this makes ΔW = scale·(U·D − U₀·D₀) of it where the job starts at factors U₀, D₀.

    The base weights stay as they are. Its file is the LoRA of twice the rank: [U, −U₀]·[D; D₀].
    """

    inits = frozenset({*DIFFERENCE_INITS, "instant"})

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        self.counted = self.options.network_init in DIFFERENCE_INITS
        if self.counted:
            self.down0: Tensor
            self.up0: Tensor
            self.register_buffer("down0", self.down.detach().clone())
            self.register_buffer("up0", torch.zeros_like(self.up))

    @torch.no_grad()
    def start(self, down: Tensor, up: Tensor) -> None:
        for tensor, given in ((self.down, down), (self.down0, down), (self.up, up), (self.up0, up)):
            tensor.copy_(given.view(tensor.shape))

    def pair(self) -> tuple[Tensor, Tensor]:
        down, up = super().pair()
        return (torch.cat([down, self.down0]), torch.cat([up, -self.up0], 1)) if self.counted else (down, up)

    def _sum(self, x: Tensor) -> Tensor:
        """Both products draw their dropout alike."""
        if not self.counted:
            return super()._sum(x)
        return self._update(x, *super().pair()) - self._update(x, self.down0, self.up0)

    def tensors(self) -> dict[str, Tensor]:
        plain = super().tensors()
        return {**plain, ALPHA: torch.tensor(self.scale * len(plain[DOWN]))} if self.counted else plain
