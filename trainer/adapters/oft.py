"""OFT: small rotations of a layer's outputs (2306.07280), one block of neighbouring outputs at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..maths.lowrank import scaled
from ..maths.rotation import cayley_minus_identity, turn
from ..maths.weights import bias_of, weight_of, weight_shape
from .base import ADAPTERS, AdapterSpec, Strength
from .direct import Direct
from .file_delta import ALPHA, alpha_of, limited
from .library import EAGER, functional
from .lokr import factor_pair
from .where import ignores, in_any_block, strength_of_one

NO_PLACE = "a rotation that is only half done is no rotation"


class Rotation(Direct):
    """W′ = Rᵀ·W or R·W for a rotation R that mixes outputs, made of small blocks Q − Qᵀ. R starts as the identity.

    Applied to the layer's output without its bias. The strength κ means W + κ·(W′ − W), as WebUIs do it.
    """

    needs = frozenset({"rank"})
    file_tensors = ("oft_blocks", "alpha")
    ranked = False
    scalable = False

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    def constants(self) -> dict[str, float]:
        """In these files alpha limits the rotation; 0 sets no limit."""
        return {ALPHA: 0.0}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        blocks, outputs = tensors.get("oft_blocks"), weight_shape(self.module)[0]
        if blocks is not None:
            tensors = {**tensors, "oft_blocks": limited(blocks.float(), (alpha_of(tensors) or 0.0) * outputs)}
        return super().read(tensors, factor)

    @abstractmethod
    def turned(self, outputs: Tensor) -> Tensor:
        """(R − 1) on outputs (out, N)."""

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        y = self._base(x)
        module = self.module
        if self._plain:
            shape = (-1,) if self.kind == "linear" else (-1, 1, 1)
            bias = bias_of(module)
            product = y if bias is None else y - bias.to(y.dtype).view(shape)
        else:
            x = x.to(y.dtype)
            product = self._operate(x, weight_of(module, x.dtype))
        if self.kind == "linear":
            update = self.turned(product.reshape(-1, product.shape[-1]).t()).t().reshape(y.shape)
        else:
            first = product.transpose(0, 1)
            update = self.turned(first.reshape(len(first), -1)).view(first.shape).transpose(0, 1)
        return y + scaled(update, strength)


@ADAPTERS.register("oft")
class Oft(Rotation):
    """R is block-diagonal; the blocks have at most `rank` rows (LyCORIS's rule)."""

    help = (
        "Rotates small groups of outputs and keeps their magnitudes: preserves what the model knows. Rank is the"
        " group size."
    )
    rules = (*ignores("oft", "network_alpha", "network_conv_alpha"), strength_of_one("oft", NO_PLACE))

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        size, count = factor_pair(weight_shape(layer.module)[0], self.rank)
        self.oft_blocks = nn.Parameter(torch.zeros(count, size, size))

    def turned(self, outputs: Tensor) -> Tensor:
        return turn(outputs, cayley_minus_identity(self.oft_blocks).transpose(1, 2))

    def delta(self) -> Tensor:
        weight = weight_of(self.module, torch.float32)
        theirs = functional("diag_oft")
        if theirs is None:
            return self.turned(weight.flatten(1)).view(weight.shape)
        delta: Tensor = theirs.diff_weight(weight, self.oft_blocks.float(), None, backend=EAGER)
        return delta.view(weight.shape)
