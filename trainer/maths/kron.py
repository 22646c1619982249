"""A frozen layer with the update kron(w1, w2), applied as two small contractions so that the product is never formed.

w1 (l, m), w2 (k, n[, kh, kw]), ΔW (l·k, m·n[, kh, kw]). With x cut into m pieces of n channels:
(ΔW·x)[l, k] = Σ_m w1[l, m]·Σ_n w2[k, n]·x[m, n] (LoKr, arXiv:2309.14859, eq. 9 and the mixed-product rule).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .lowrank import Geometry, Scale, conv_backward


def kron_layer(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: Scale,
    geometry: Geometry | None = None,
) -> Tensor:
    """W·x + b + s·kron(w1, w2)·x in x's precision; gradients reach x, w1 and w2.

    x: (B, …, m·n), or (B, m·n, h, w) with the `geometry` (stride, padding, dilation) of a convolution. `weight` None
    leaves W and b out. s is a number, or a tensor (B,) with one for each sample. Only x and the factors are kept.
    """
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    if geometry is None:
        y: Tensor = KronLinear.apply(x, weight, bias, w1, w2, scale)
    else:
        y = KronConv.apply(x.contiguous(), weight, bias, w1, w2, scale, geometry)
    return y


class KronLinear(torch.autograd.Function):
    """See `kron_layer`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: Scale
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight, w1, w2)
        ctx.shape, ctx.scale = x.shape, scale
        inner = _inner(rows, w1, w2)
        factor = _scale_rows(inner, scale, x.shape[0])
        (fan_l, _), fan_k = w1.shape, w2.shape[0]
        if weight is None:
            y = torch.bmm(w1.expand(len(rows), -1, -1), inner).mul_(factor)
        else:
            y = functional.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            y.view(-1, fan_l, fan_k).baddbmm_(w1.expand(len(rows), -1, -1), inner, alpha=factor)
        return y.view(*x.shape[:-1], fan_l * fan_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, w1, w2 = ctx.saved_tensors
        need_x, _, _, need_1, need_2 = ctx.needs_input_grad[:5]
        (fan_l, fan_m), (fan_k, fan_n), batch = w1.shape, w2.shape, ctx.shape[0]
        flat = grad.reshape(-1, fan_l * fan_k)
        outer = flat.view(-1, fan_l, fan_k)
        grad_x = grad_1 = grad_2 = None
        if need_1:
            inner = _inner(rows, w1, w2)
            factor = _scale_rows(inner, ctx.scale, batch)
            grad_1 = outer.transpose(1, 2).reshape(-1, fan_l).t() @ inner.transpose(1, 2).reshape(-1, fan_m)
            grad_1.mul_(factor)
        if need_x or need_2:
            back = torch.bmm(w1.t().expand(len(flat), -1, -1), outer)
            factor = _scale_rows(back, ctx.scale, batch)
            back = back.view(-1, fan_k)
            if need_2:
                grad_2 = (back.t() @ rows.view(-1, fan_n)).mul_(factor)
            if need_x:
                grad_x = (back @ w2).view(rows.shape)
                grad_x = grad_x.mul_(factor) if weight is None else torch.addmm(
                    grad_x, flat, weight.to(grad.dtype), beta=factor)
                grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_1, grad_2, None


class KronConv(torch.autograd.Function):
    """The same for a 2-D convolution: w2 carries the kernel, w1 mixes the pieces afterwards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: Scale,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, w1, w2)
        ctx.scale, ctx.geometry = scale, geometry
        inner, size = _inner_conv(x, w1, w2, geometry)
        factor = _scale_rows(inner, scale, len(x))
        mixing = w1.expand(len(x), -1, -1)
        if weight is None:
            y = torch.bmm(mixing, inner).mul_(factor)
        else:
            y = functional.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
            y = y.contiguous()
            y.view(inner.shape[0], len(w1), -1).baddbmm_(mixing, inner, alpha=factor)
        return y.view(len(x), w1.shape[0] * w2.shape[0], *size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, w1, w2 = ctx.saved_tensors
        need_x, _, _, need_1, need_2 = ctx.needs_input_grad[:5]
        batch, (fan_l, fan_m) = len(x), w1.shape
        grad = grad.contiguous()
        outer = grad.view(batch, fan_l, -1)
        grad_x = grad_1 = grad_2 = None
        if need_1:
            inner, _ = _inner_conv(x, w1, w2, ctx.geometry)
            factor = _scale_rows(inner, ctx.scale, batch)
            grad_1 = torch.bmm(outer, inner.transpose(1, 2)).sum(0).mul_(factor)
        if need_x or need_2:
            back = torch.bmm(w1.t().expand(batch, -1, -1), outer)
            factor = _scale_rows(back, ctx.scale, batch)
            back = back.mul_(factor).view(batch * fan_m, -1, *grad.shape[2:])
            pieces = x.view(batch * fan_m, -1, *x.shape[2:])
            grad_x, grad_2 = conv_backward(back, pieces, w2, ctx.geometry, (need_x, need_2))
        if need_x and grad_x is not None:
            grad_x = grad_x.view(x.shape)
            if weight is not None:
                base, _ = conv_backward(grad, x, weight.to(grad.dtype), ctx.geometry, (True, False))
                grad_x = grad_x.add_(base)
        return grad_x, None, None, grad_1, grad_2, None, None


def _inner(rows: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Σ_n w2[k, n]·x[m, n] as (rows, m, k)."""
    return (rows.reshape(-1, w2.shape[1]) @ w2.t()).view(len(rows), w1.shape[1], w2.shape[0])


def _inner_conv(x: Tensor, w1: Tensor, w2: Tensor, geometry: Geometry) -> tuple[Tensor, torch.Size]:
    """The same for pictures, as (B, m, k·h·w), and the size (h, w)."""
    inner = functional.conv2d(x.view(len(x) * w1.shape[1], -1, *x.shape[2:]), w2, None, *geometry)
    return inner.reshape(len(x), w1.shape[1], -1), inner.shape[2:]


def _scale_rows(middle: Tensor, scale: Scale, batch: int) -> float:
    """Multiply a middle (rows, …) in place by a scale for each sample; returns the number that is still to be applied.
    """
    if not isinstance(scale, Tensor):
        return scale
    if scale.shape[0] != batch:
        raise ValueError(f"the strength has {scale.shape[0]} values for a batch of {batch}")
    middle.view(batch, -1).mul_(scale.to(middle)[:, None])
    return 1.0
