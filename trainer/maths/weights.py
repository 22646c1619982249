"""The weight of a base layer, wherever and however it is stored: the one place that reads it.

What adapters, stages and modes compute with W goes through `weight_of` and `weight_shape`, so that a layer may keep its
weight quantised or in other memory without any of them knowing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def weight_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight W of a layer, (out, in[, k, k]) or (channels,), on the layer's device.

    In the precision asked for; None gives it as it is stored, without a copy. It is read only. Raises TypeError for a
    layer without a weight.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight that is a tensor")
    return weight if dtype is None else weight.to(dtype)


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, (out,), as it is stored; None for a layer without."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def weight_shape(module: nn.Module) -> torch.Size:
    """The shape of `weight_of`, without reading the numbers."""
    return weight_of(module).shape


def weight_matrix(module: nn.Module) -> tuple[int, int]:
    """(out, in·k·k): the sizes of the weight as a matrix."""
    fan_out, *rest = weight_shape(module)
    return fan_out, math.prod(rest)
