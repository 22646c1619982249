"""A frozen linear or convolutional layer with a full-size update that is built anew in the backward pass.

y = (W + s·Δ)·x + b, where Δ follows from few numbers. Only x and those numbers are kept for the backward pass: neither
Δ nor the sum, which for all layers together would be another copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .functions import applied
from .lowrank import EXACT, Geometry, conv_backward

Build = Callable[..., Tensor]


def rebuilt(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    build: Build,
    parameters: Sequence[Tensor],
    geometry: Geometry | None = None,
) -> Tensor:
    """(W + s·Δ)·x + b with Δ = build(*parameters), shaped like the layer's weight; gradients reach x and `parameters`.

    x: (…, in), or (B, in, h, w) with the `geometry` (stride, padding, dilation) of a convolution. `weight` None leaves
    W out. Computed in x's precision; W may be stored in another, Δ is built in its own. In half precision W·x and s·Δ·x
    are added, not W and s·Δ: a Δ below the last digit of W would have no effect.
    """
    return applied(Rebuilt, x, weight, bias, scale, build, geometry, *parameters)


class Rebuilt(torch.autograd.Function):
    """See `rebuilt`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        build: Build,
        geometry: Geometry | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *parameters)
        ctx.scale, ctx.build, ctx.geometry = scale, build, geometry
        bias = None if bias is None else bias.to(x.dtype)
        first, *rest = (
            functional.linear(x, part, its) if geometry is None else functional.conv2d(x, part, its, *geometry)
            for part, its in zip(_parts(weight, build(*parameters), scale, x.dtype), (bias, None), strict=False)
        )
        return first.add_(rest[0]) if rest else first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        with torch.enable_grad():
            given = [p.detach().requires_grad_(need) for p, need in zip(parameters, needs, strict=True)]
            delta = ctx.build(*given)
        need_x = ctx.needs_input_grad[0]
        first, *rest = _parts(weight, delta.detach(), ctx.scale, grad.dtype)
        grad_x, grad_total = _gradients(grad, x, first, ctx.geometry, (need_x, any(needs)))
        if rest and grad_x is not None:
            other, _ = _gradients(grad, x, rest[0], ctx.geometry, (True, False))
            grad_x = grad_x if other is None else grad_x + other
        wanted = [p for p, need in zip(given, needs, strict=True) if need]
        found: Iterator[Tensor | None] = iter(())
        if grad_total is not None:
            outer = grad_total.to(delta.dtype).mul_(ctx.scale).view(delta.shape)
            found = iter(torch.autograd.grad(delta, wanted, outer, allow_unused=True))
        return grad_x, None, None, None, None, None, *(next(found) if need else None for need in needs)


def _parts(weight: Tensor | None, delta: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What x is multiplied with: W + s·Δ, or s·Δ without W, or both one by one where their sum would lose digits."""
    if weight is None:
        return (delta.to(dtype) * scale,)
    delta = delta.view(weight.shape)
    if dtype in EXACT:
        return (torch.add(weight.to(dtype), delta.to(dtype), alpha=scale),)
    return weight.to(dtype), (delta * scale).to(dtype)


def _gradients(
    grad: Tensor, x: Tensor, total: Tensor, geometry: Geometry | None, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer or a convolution for its input and its weight."""
    if geometry is not None:
        return conv_backward(grad, x, total, geometry, need)
    grad_x = grad @ total if need[0] else None
    grad_total = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) if need[1] else None
    return grad_x, grad_total
