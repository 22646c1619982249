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

from .functions import applied
from .lowrank import Geometry, Scale, conv_backward


def kron_layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    scale: Scale,
    geometry: Geometry | None = None,
) -> Tensor:
    """W·x + b + s·kron(w1, w2)·x in x's precision; gradients reach x, w1 and w2.

    x: (B, …, m·n), or (B, m·n, h, w) with the `geometry` (stride, padding, dilation) of a convolution. `weight` None
    leaves W and b out. s is a number, or a tensor (B,) with one for each sample. Only x and the factors are kept.
    """
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype).contiguous()  # a kernel in another order would give gradients in that
    if geometry is None:
        return applied(KronLinear, x, weight, bias, w1, w2, scale)
    return applied(KronConv, x.contiguous(), weight, bias, w1, w2, scale, geometry)


def kron_inner(weight: Tensor, w1: Tensor, w2: Tensor, on_input: bool) -> Tensor:
    """⟨W, kron(w1, w2)⟩ for each input (m·n,) or output (l·k,) of a weight shaped like the product, float32.

    One pass over W, read in place as a stack of matrices in W's precision, and a second one over a piece of its size.
    """
    (fan_l, fan_m), (fan_k, fan_n) = w1.shape, w2.shape[:2]
    w1, w2 = w1.to(weight.dtype), w2.to(weight.dtype).reshape(fan_k, fan_n, -1)
    if on_input:  # Σ_l w1[l, m]·W[l, k, m, n, q], then Σ_kq with w2[k, n, q]
        stack = weight.reshape(fan_l, fan_k * fan_m, -1).transpose(0, 1)
        by = w1.t().expand(fan_k, -1, -1).reshape(fan_k * fan_m, 1, fan_l)
        pieces = torch.bmm(by, stack).view(fan_k, fan_m, fan_n, -1)
        return (pieces.float() * w2[:, None].float()).sum((0, 3)).flatten()
    stack = weight.reshape(fan_l * fan_k, fan_m, -1)  # Σ_nq W[l, k, m, n, q]·w2[k, n, q], then Σ_m with w1[l, m]
    by = w2.reshape(fan_k, -1, 1).expand(fan_l, -1, -1, -1).reshape(fan_l * fan_k, -1, 1)
    pieces = torch.bmm(stack, by).view(fan_l, fan_k, fan_m)
    return (pieces.float() * w1[:, None].float()).sum(2).flatten()


def kron_delta(w1: Tensor, w2: Tensor) -> Tensor:
    """kron(w1, w2) as a weight (l·k, m·n[, kh, kw])."""
    (fan_l, fan_m), (fan_k, fan_n, *kernel) = w1.shape, w2.shape
    product = w1.reshape(fan_l, 1, fan_m, 1, *(1 for _ in kernel)) * w2.reshape(1, fan_k, 1, fan_n, *kernel)
    return product.reshape(fan_l * fan_k, fan_m * fan_n, *kernel)


class KronLinear(torch.autograd.Function):
    """See `kron_layer`. The pieces come first in every middle, (m, rows, k), so that all products are large ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: Scale
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight, w1, w2)
        ctx.shape, ctx.scale = x.shape, scale
        inner = _inner(rows, w1, w2)
        factor = _scale_rows(inner, scale, x.shape[0])
        update = (w1 @ inner.flatten(1)).view(-1, *inner.shape[1:]).transpose(0, 1)
        if weight is None:
            y = update.mul(factor).reshape(len(rows), -1)
        else:
            y = functional.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            y.view(update.shape).add_(update, alpha=factor)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, w1, w2 = ctx.saved_tensors
        need_x, _, _, need_1, need_2 = ctx.needs_input_grad[:5]
        flat = grad.reshape(len(rows), -1)
        outer = flat.view(len(rows), len(w1), -1).transpose(0, 1).contiguous()
        grad_x = grad_1 = grad_2 = None
        if need_1:
            inner = _inner(rows, w1, w2)
            factor = _scale_rows(inner, ctx.scale, ctx.shape[0])
            grad_1 = (outer.flatten(1) @ inner.flatten(1).t()).mul_(factor)
        if need_x or need_2:
            back = (w1.t() @ outer.flatten(1)).view(-1, *outer.shape[1:])
            factor = _scale_rows(back, ctx.scale, ctx.shape[0])
            if need_2:
                pieces = rows.view(len(rows), len(back), -1).transpose(0, 1)
                grad_2 = torch.bmm(back.transpose(1, 2), pieces).sum(0).mul_(factor)
            if need_x:
                through = (back @ w2).transpose(0, 1)
                if weight is None:
                    grad_x = through.mul(factor).reshape(ctx.shape)
                else:
                    grad_x = flat @ weight.to(grad.dtype)
                    grad_x = grad_x.view(through.shape).add_(through, alpha=factor).view(ctx.shape)
        return grad_x, None, None, grad_1, grad_2, None


class KronConv(torch.autograd.Function):
    """The same for a 2-D convolution: w2 carries the kernel, w1 mixes the pieces afterwards."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        scale: Scale,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, w1, w2)
        ctx.scale, ctx.geometry = scale, geometry
        inner, size = _inner_conv(x, w1, w2, geometry)
        factor = _scale_rows(inner, scale, len(x), False)
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
            factor = _scale_rows(inner, ctx.scale, batch, False)
            grad_1 = torch.bmm(outer, inner.transpose(1, 2)).sum(0).mul_(factor)
        if need_x or need_2:
            back = torch.bmm(w1.t().expand(batch, -1, -1), outer)
            factor = _scale_rows(back, ctx.scale, batch, False)
            back = back.mul_(factor).view(batch * fan_m, -1, *grad.shape[2:])
            pieces = x.view(batch * fan_m, -1, *x.shape[2:])
            grad_x, grad_2 = conv_backward(back, pieces, w2, ctx.geometry, (need_x, need_2))
        if need_x and grad_x is not None:
            grad_x = grad_x.view(x.shape)
            if weight is not None:
                base, _ = conv_backward(grad, x, weight.to(grad.dtype), ctx.geometry, (True, False))
                grad_x = grad_x if base is None else grad_x.add_(base)
        return grad_x, None, None, grad_1, grad_2, None, None


def _inner(rows: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Σ_n w2[k, n]·x[m, n] as (m, rows, k)."""
    return rows.view(len(rows), w1.shape[1], -1).transpose(0, 1) @ w2.t()


def _inner_conv(x: Tensor, w1: Tensor, w2: Tensor, geometry: Geometry) -> tuple[Tensor, torch.Size]:
    """The same for pictures, as (B, m, k·h·w), and the size (h, w)."""
    inner = functional.conv2d(x.view(len(x) * w1.shape[1], -1, *x.shape[2:]), w2, None, *geometry)
    return inner.reshape(len(x), w1.shape[1], -1), inner.shape[2:]


def _scale_rows(middle: Tensor, scale: Scale, batch: int, by_rows: bool = True) -> float:
    """Multiply a middle in place by a scale for each sample; returns the number that is still to be applied.

    The middle is (pieces, rows, k) with the samples in the rows, or (B, pieces, k·h·w).
    """
    if not isinstance(scale, Tensor):
        return scale
    if scale.shape[0] != batch:
        raise ValueError(f"the strength has {scale.shape[0]} values for a batch of {batch}")
    by = scale.to(middle)
    middle.mul_(by.repeat_interleave(middle.shape[1] // batch)[:, None] if by_rows else by.view(-1, 1, 1))
    return 1.0
