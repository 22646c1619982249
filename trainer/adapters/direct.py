"""Types whose parameters are their file's tensors: writing, reading and scaling, written once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .base import ADAPTERS, Adapter
from .file_delta import ALPHA, scale_of


class Direct(Adapter):
    """An adapter with the same numbers in its parameters and in its file.

    `named`: parameter → file tensor, where the names differ. `constants`: further numbers of the file, which have one
    value. What ΔW is proportional to (`factors`) takes up a change of strength or alpha.
    """

    named: ClassVar[Mapping[str, str]] = {}

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that are in the file, by their names there."""
        named = ((self.named.get(name, name), p) for name, p in self._parameters.items() if p is not None)
        return {name: p for name, p in named if name in self.file_tensors}

    def constants(self) -> dict[str, float]:
        """Numbers in the file beside the parameters."""
        return {ALPHA: self.alpha} if self.ranked else {}

    def tensors(self) -> dict[str, Tensor]:
        own = {name: p.detach() for name, p in self.own().items()}
        return {**own, **{name: torch.tensor(value) for name, value in self.constants().items()}}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        own = self.own()
        self.expect(tensors, tuple(own), tuple(self.constants()))
        found = {name: self.shaped(name, tensors[name], p).float() for name, p in own.items()}
        if self.ranked:
            factor = factor * scale_of(tensors, self.rank) / self.scale
        found = self.rescaled(found, factor)
        back = {given: name for name, given in self.named.items()}
        return {back.get(given, given): tensor for given, tensor in found.items()}

    def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """|factor| shared evenly between the factors, its sign on the last, so that none leaves the range of fp16."""
        if factor == 1.0:
            return dict(tensors)
        groups = [[self.named.get(name, name) for name in group] for group in self.factors]
        groups = [group for group in groups if any(name in tensors for name in group)]
        if not groups:
            raise self.no_place_for_strength()
        share, changed = abs(factor) ** (1 / len(groups)), dict(tensors)
        for place, group in enumerate(groups):
            sign = math.copysign(1.0, factor) if place == len(groups) - 1 else 1.0
            changed.update({name: tensors[name] * (share * sign) for name in group if name in tensors})
        return changed

    def no_place_for_strength(self) -> AdapterError:
        """What to raise where no file tensors stand for a multiple of ΔW."""
        return AdapterError(
            f"{self.key}: a file of this type has no place for a strength. Set network_strength to 1 and choose the"
            " strength when you use the file."
        )

    def expect(self, tensors: Mapping[str, Tensor], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
        """Raise AdapterError unless a file has the needed tensors for this layer and no others but the optional."""
        if not set(needed) <= set(tensors) or set(tensors) - {*needed, *optional}:
            kind = next((name for name, found in ADAPTERS.items() if found is type(self)), type(self).__name__)
            raise AdapterError(
                f"{self.key} in the file has the tensors {', '.join(sorted(tensors))}, but network_type {kind} with"
                f" these settings has {', '.join((*needed, *optional))}. Choose the type and settings the file was made"
                " with."
            )

    def shaped(self, name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A file tensor in a parameter's shape; axes of size 1 do not count."""
        if [size for size in tensor.shape if size > 1] != [size for size in parameter.shape if size > 1]:
            raise AdapterError(
                f"{self.key}.{name} is {tuple(tensor.shape)} in the file, and this network needs"
                f" {tuple(parameter.shape)}. Choose the network_rank and the other settings the file was made with, or"
                " a file for this kind of base model."
            )
        return tensor.reshape(parameter.shape)


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from N(0, std²), float32 on the CPU."""
    return nn.Parameter(torch.randn(shape, generator=generator) * std)
