"""BOFT: rotations of outputs as several stages of small ones, arranged like a butterfly (2311.06243)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.rotation import butterfly, cayley_minus_identity
from ..maths.weights import weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .library import EAGER, functional
from .oft import NO_PLACE, Rotation
from .where import ignores, strength_of_one


def butterfly_sizes(outputs: int, limit: int) -> tuple[int, int] | None:
    """(block size, number of blocks): the largest even size up to `limit` that leaves a power of two, or None."""
    sizes = [b for b in range(2, min(limit, outputs) + 1, 2) if outputs % b == 0 and (outputs // b).bit_count() == 1]
    return (max(sizes), outputs // max(sizes)) if sizes else None


@ADAPTERS.register("boft")
class Boft(Rotation):
    """R is a product of as many block-diagonal stages as reach every output from every other."""

    help = "Like oft, with groups mixed in several stages: finer, slower. Rank is the group size."
    rules = (*ignores("boft", "network_alpha", "network_conv_alpha"), strength_of_one("boft", NO_PLACE))

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        outputs = weight_shape(layer.module)[0]
        sizes = butterfly_sizes(outputs, self.rank)
        if sizes is None:
            least = next((b for b in range(2, outputs + 1, 2) if butterfly_sizes(outputs, b)), 0)
            right = f"Set it to at least {least}" if least else "Choose network_type oft"
            raise AdapterError(
                f"{self.key} has {outputs} outputs, which groups of at most {self.rank} (its rank) cannot form: boft"
                f" needs an even group size that leaves a power of two. {right}, or leave the layer out."
            )
        size, count = sizes
        self.oft_blocks = nn.Parameter(torch.zeros((count - 1).bit_count() + 1, count, size, size))

    def turned(self, outputs: Tensor) -> Tensor:
        return butterfly(outputs, cayley_minus_identity(self.oft_blocks)) - outputs

    def delta(self) -> Tensor:
        weight = weight_of(self.module, torch.float32)
        theirs = functional("boft")
        if theirs is None:
            return self.turned(weight.flatten(1)).view(weight.shape)
        delta: Tensor = theirs.diff_weight(weight, self.oft_blocks.float(), None, backend=EAGER)
        return delta.view(weight.shape)
