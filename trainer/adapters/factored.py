"""Types whose ΔW is a product U·D made of fewer or other numbers than U and D: written and computed as plain LoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.subspace import product_norm
from ..maths.weights import weight_matrix, weight_shape
from .base import Adapter, AdapterSpec, Groups, Strength
from .dora import DoraOptions
from .file_delta import DOWN, UP, alpha_of
from .plain_lora import Lora
from .where import in_any_block

F = TypeVar("F", bound="Factored")
LOST = 1e-2
"""Largest share of a file's ΔW, by norm, that may be lost when it is taken over: the rounding of fp16."""


class Factored(Lora):
    """A LoRA whose factors (`pair`) come from other tensors. Its file is a plain LoRA, exactly.

    A subclass sets `product` and `fit`. It covers what lierla covers, and with a conv rank what c3lier covers.

    Where a subclass declares use_dora, each row of ΔW has a factor 1 + `rows` of its own: no DoRA, for no length of the
    weight is in it, but it goes into U and the file stays a plain LoRA. Null-LoRA does not: a file with scaled rows
    could not be continued, for they hide which columns were frozen.
    """

    factors: ClassVar[Groups] = ()
    ups: ClassVar[tuple[str, ...]] = ()
    downs: ClassVar[tuple[str, ...]] = ()
    inits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        Adapter.__init__(self, layer, spec, strength, generator)
        fan_out, *rest = weight_shape(layer.module)
        self.fan_out, self.fan_in, self.kernel = int(fan_out), weight_matrix(layer.module)[1], tuple(rest)
        self.row_scaled = spec[DoraOptions].use_dora
        if self.row_scaled:
            self.rows = nn.Parameter(torch.zeros(self.fan_out))

    @abstractmethod
    def product(self) -> tuple[Tensor, Tensor]:
        """D (r, in[, k, k]) and U (out, r) without the factors of the rows."""

    def pair(self) -> tuple[Tensor, Tensor]:
        down, up = self.product()
        return down, self.by_rows(up)

    def by_rows(self, up: Tensor) -> Tensor:
        """U (out, r) with its rows scaled."""
        return up * (1 + self.rows)[:, None] if self.row_scaled else up

    def _apply(self: F, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> F:
        """Move to a device or precision; what is frozen stays float32, in which alone it is orthonormal."""
        frozen = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in frozen.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        if spec.conv_rank and layer.part == "unet":
            return in_any_block(layer)
        return super().covers(layer, spec)

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        wide = {"conv_dim": str(spec.rank_of("conv3x3")), "conv_alpha": str(spec.alpha_of("conv3x3"))}
        return {"type": spec.type, **(wide if spec.conv_rank else {})}

    @abstractmethod
    def fit(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """Own tensors whose U·D, no row scaled, is the product of `up` (out, r) and `down` (r, in), float32 on the CPU.

        Raises AdapterError where that product is not one this type can make.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The plain LoRA, rows of D and columns of U brought to equal norms, so that both keep well in fp16."""
        plain = super().tensors()
        down, up = plain[DOWN].float(), plain[UP].float()
        ratio = (up.flatten(1).norm(dim=0) / down.flatten(1).norm(dim=1)).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        tail = (1,) * (down.ndim - 2)
        plain[DOWN] = (down * ratio.view(-1, 1, *tail)).to(plain[DOWN].dtype)
        plain[UP] = (up / ratio.view(1, -1, *tail)).to(plain[UP].dtype)
        return plain

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        found = self.named(tensors)
        down, up = found[DOWN].float().flatten(1), found[UP].float().flatten(1)
        if (down.shape[1], up.shape[0]) != (self.fan_in, self.fan_out) or down.shape[0] != up.shape[1]:
            raise AdapterError(
                f"{self.key} in the file is made for a layer of {up.shape[0]} × {down.shape[1]} numbers, this model's"
                f" has {self.fan_out} × {self.fan_in}. The file was made for another kind of base model."
            )
        given = alpha_of(found)
        alpha = float(len(down)) if given is None else given
        own = self.fit(down, up * (factor * alpha / len(down) / self.scale))
        return {**own, "rows": torch.zeros(self.fan_out)} if self.row_scaled else own

    def lost(self, down: Tensor, up: Tensor, own_down: Tensor, own_up: Tensor) -> float:
        """The share of the product of `up` and `down`, by norm, that is missing from own_up·own_down."""
        whole = product_norm(down, up)
        rest = product_norm(torch.cat([down, own_down]), torch.cat([up, -own_up], dim=1))
        return float(rest / whole) if whole > 0 else 0.0
