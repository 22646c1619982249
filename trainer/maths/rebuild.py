"""A frozen linear or convolutional layer with a full-size update that is built anew in the backward pass.

y = (W + s·Δ)·x + b, where Δ follows from few numbers. Only x and those numbers are kept for the backward pass: neither
Δ nor the sum, which for all layers together would be another copy of the model.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .lowrank import Geometry, conv_backward

Build = Callable[..., Tensor]


def rebuilt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, build: Build, parameters: Sequence[Tensor],
    geometry: Geometry | None = None,
) -> Tensor:
    """(W + s·Δ)·x + b with Δ = build(*parameters), shaped like the layer's weight; gradients reach x and `parameters`.

    x: (…, in), or (B, in, h, w) with the `geometry` (stride, padding, dilation) of a convolution. `weight` None leaves
    W out. Computed in x's precision; W may be stored in another, Δ is built in its own.
    """
    y: Tensor = Rebuilt.apply(x, weight, bias, scale, build, geometry, *parameters)
    return y


class Rebuilt(torch.autograd.Function):
    """See `rebuilt`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, build: Build,
        geometry: Geometry | None, *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *parameters)
        ctx.scale, ctx.build, ctx.geometry = scale, build, geometry
        total = _total(weight, build(*parameters), scale, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, total, bias) if geometry is None else functional.conv2d(x, total, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        with torch.enable_grad():
            given = [p.detach().requires_grad_(need) for p, need in zip(parameters, needs, strict=True)]
            delta = ctx.build(*given)
        total = _total(weight, delta.detach(), ctx.scale, grad.dtype)
        grad_x, grad_total = _gradients(grad, x, total, ctx.geometry, (ctx.needs_input_grad[0], any(needs)))
        wanted = [p for p, need in zip(given, needs, strict=True) if need]
        found = iter(())
        if grad_total is not None:
            outer = grad_total.to(delta.dtype).mul_(ctx.scale).view(delta.shape)
            found = iter(torch.autograd.grad(delta, wanted, outer, allow_unused=True))
        return grad_x, None, None, None, None, None, *(next(found) if need else None for need in needs)


def _total(weight: Tensor | None, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + s·Δ, or s·Δ without W."""
    if weight is None:
        return delta.to(dtype) * scale
    return torch.add(weight.to(dtype), delta.to(dtype).view(weight.shape), alpha=scale)


def _gradients(
    grad: Tensor, x: Tensor, total: Tensor, geometry: Geometry | None, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer or a convolution for its input and its weight."""
    if geometry is not None:
        return conv_backward(grad, x, total, geometry, need)
    grad_x = grad @ total if need[0] else None
    grad_total = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) if need[1] else None
    return grad_x, grad_total
