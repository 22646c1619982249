"""Calls of our own differentiable functions, with the types that torch leaves out."""

from __future__ import annotations

import torch
from torch import Tensor


def applied(function: type[torch.autograd.Function], *given: object) -> Tensor:
    """The output of a function with a backward pass of its own."""
    made: Tensor = function.apply(*given)
    return made
