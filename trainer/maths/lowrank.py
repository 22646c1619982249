"""A frozen linear or convolutional layer with a low-rank update, as one operation with a hand-written backward pass.

y = W·x + b + s·U·(D·x) with D (r, in[, k, k]) "down" and U (out, r) "up" (LoRA, arXiv:2106.09685, eq. 3). W and b are
frozen and may be stored in another precision than x: they are cast per call and the *stored* tensors are kept for the
backward pass. s is a number, a tensor (B,) with one number per sample of the batch, or (B, r) with one per rank too.

Two ways to the same result are chosen by their cost (`merging_pays`): through the rank-r middle (few multiplications
when the layer is wide), or through the summed weight W + s·U·D (when it is narrow and the batch has many rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .functions import applied

Geometry = tuple[Any, Any, Any]  # stride, padding, dilation of a convolution
Scale = float | Tensor
_POINTWISE = [[1, 1], [0, 0]]
EXACT = (torch.float32, torch.float64)
"""Precisions in which a weight and a small change of it may be added."""


class LowRank(NamedTuple):
    """ΔW = scale·U·D: `down` (r, in[, k, k]), `up` (out, r), differentiable. `error`: of what they stand for, relative
    (0: they are it exactly).
    """

    down: Tensor
    up: Tensor
    scale: float
    error: float = 0.0


def kaiming_down(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A down matrix drawn as Kaiming-uniform with a = √5, that is U(−1/√fan_in, 1/√fan_in), in float32 on the CPU."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """ΔW = s·U·D in float32, of shape (out, in) or (out, in, k, k)."""
    delta = up.float() @ down.float().flatten(1)
    return delta.mul(scale).view(up.shape[0], *down.shape[1:])


def cored(core: Tensor, down: Tensor) -> Tensor:
    """Σ_b core[a, b, y, x]·down[b, i] as (a, i, y, x): the D of a Tucker form."""
    return torch.einsum("abyx,bi->aiyx", core, down.flatten(1)).contiguous()


def working_dtype(x: Tensor) -> torch.dtype:
    """The precision a layer computes in: autocast's where it is on for x's device, else x's own."""
    if _autocast_is_on(x.device.type):
        return _autocast_dtype(x.device.type)
    return x.dtype


def _autocast_functions() -> tuple[Callable[[str], bool], Callable[[str], torch.dtype]]:
    """Whether autocast is on and in which precision; torch before 2.4 asks per device with other names."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.is_autocast_enabled, torch.get_autocast_dtype
    return (
        lambda device: torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled(),
        lambda device: torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype(),
    )


_autocast_is_on, _autocast_dtype = _autocast_functions()


def merging_pays(rows: int, fan_in: int, fan_out: int, rank: int) -> bool:
    """Whether W + s·U·D costs fewer multiplications in forward and backward than the way through the rank-r middle.

    Merged: the weight's gradient (rows·in·out) and four products with the factors (4·r·in·out). Through the middle:
    3·rows·r·(in + out).
    """
    area = fan_in * fan_out
    return area * (rows + 4 * rank) < 3 * rows * rank * (fan_in + fan_out)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Scale) -> Tensor:
    """W·x + b + s·U·D·x for x (B, …, in), computed in x's precision; gradients reach x, D and U."""
    if not isinstance(scale, Tensor) and x.dtype in EXACT:
        fan_out, fan_in = weight.shape
        if merging_pays(x.numel() // fan_in, fan_in, fan_out, down.shape[0]):
            merged = torch.addmm(_cast(weight, x), _cast(up, x), _cast(down, x), alpha=scale)
            return functional.linear(x, merged, None if bias is None else _cast(bias, x))
    return applied(LowRankLinear, x, weight, bias, down, up, scale)


def low_rank_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Scale, geometry: Geometry
) -> Tensor:
    """The same for a 2-D convolution of x (B, in, h, w) with zero padding: the kernel is on the down side."""
    if not isinstance(scale, Tensor) and x.dtype in EXACT:
        fan_out, fan_in = weight.shape[0], weight[0].numel()
        rows = x.numel() // x.shape[1] // stride_area(geometry)
        if merging_pays(rows, fan_in, fan_out, down.shape[0]):
            merged = torch.addmm(
                _cast(weight, x).view(fan_out, -1), _cast(up, x), _cast(down, x).view(-1, fan_in), alpha=scale
            )
            return functional.conv2d(x, merged.view(weight.shape), None if bias is None else _cast(bias, x), *geometry)
    if x.is_contiguous() and weight.shape[2:] == (1, 1) and [_pair(value) for value in geometry[:2]] == _POINTWISE:
        return applied(LowRankPointwise, x, weight, bias, down, up, scale)
    return applied(LowRankConv, x, weight, bias, down, up, scale, geometry)


class LowRankLinear(torch.autograd.Function):
    """Through the middle: keeps x, D·x and the parameters; one pass over the output, one over the input gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Scale
    ) -> Tensor:
        shape = x.shape
        rows = x.reshape(-1, shape[-1])
        middle, factor = _scaled(functional.linear(rows, _cast(down, x)), scale, shape[0])
        y = functional.linear(rows, _cast(weight, x), None if bias is None else _cast(bias, x))
        y.addmm_(middle, _cast(up, x).t(), alpha=factor)
        ctx.save_for_backward(rows, weight, down, up, middle)
        ctx.scale, ctx.factor = scale, factor
        return y.view(*shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, middle = ctx.saved_tensors
        need_x, _, _, need_down, need_up = ctx.needs_input_grad[:5]
        factor, shape = ctx.factor, grad.shape
        grad = grad.reshape(-1, shape[-1])
        down, up = _cast(down, grad), _cast(up, grad)
        grad_x = grad_down = grad_up = None
        if need_up:
            grad_up = torch.addmm(up, grad.t(), middle, beta=0, alpha=factor)
        if need_x or need_down:
            inner, _ = _scaled(grad.mm(up), ctx.scale, shape[0])
            if need_down:
                grad_down = torch.addmm(down, inner.t(), x, beta=0, alpha=factor)
            if need_x:
                grad_x = grad.mm(_cast(weight, grad)).addmm_(inner, down, alpha=factor).view(*shape[:-1], x.shape[-1])
        return grad_x, None, None, grad_down, grad_up, None


class LowRankPointwise(torch.autograd.Function):
    """Through the middle for a 1×1 convolution of contiguous pictures: matrix products per sample instead."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Scale
    ) -> Tensor:
        batch = x.shape[0]
        points = x.flatten(2)
        middle, factor = _scaled(torch.bmm(_cast(down, x).flatten(1).expand(batch, -1, -1), points), scale, batch)
        y = functional.conv2d(x, _cast(weight, x), None if bias is None else _cast(bias, x)).contiguous()
        y.view(*y.shape[:2], -1).baddbmm_(_cast(up, x).expand(batch, -1, -1), middle, alpha=factor)
        ctx.save_for_backward(points, weight, down, up, middle)
        ctx.scale, ctx.factor = scale, factor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        points, weight, down, up, middle = ctx.saved_tensors
        need_x, _, _, need_down, need_up = ctx.needs_input_grad[:5]
        factor, (batch, _, height, width) = ctx.factor, grad.shape
        grad = grad.flatten(2)
        shape, down, up = down.shape, _cast(down, grad).flatten(1), _cast(up, grad)
        grad_x = grad_down = grad_up = None
        if need_up:
            grad_up = torch.bmm(grad, middle.transpose(1, 2)).sum(0).mul_(factor)
        if need_x or need_down:
            inner, _ = _scaled(torch.bmm(up.t().expand(batch, -1, -1), grad), ctx.scale, batch)
            if need_down:
                grad_down = torch.bmm(inner, points.transpose(1, 2)).sum(0).mul_(factor).view(shape)
            if need_x:
                grad_x = torch.bmm(_cast(weight, grad).flatten(1).t().expand(batch, -1, -1), grad)
                grad_x.baddbmm_(down.t().expand(batch, -1, -1), inner, alpha=factor)
                grad_x = grad_x.view(batch, -1, height, width)
        return grad_x, None, None, grad_down, grad_up, None


class LowRankConv(torch.autograd.Function):
    """Through the middle for a convolution: keeps x, D*x and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: Scale,
        geometry: Geometry,
    ) -> Tensor:
        middle, factor = _scaled(functional.conv2d(x, _cast(down, x), None, *geometry), scale, x.shape[0])
        y = functional.conv2d(x, _cast(weight, x), None if bias is None else _cast(bias, x), *geometry)
        up_here = _cast(up, x)
        if y.is_contiguous():
            flat = y.view(*y.shape[:2], -1)
            flat.baddbmm_(up_here.expand(y.shape[0], -1, -1), middle.flatten(2), alpha=factor)
        else:
            y.add_(functional.conv2d(middle, up_here[:, :, None, None]), alpha=factor)
        ctx.save_for_backward(x, weight, down, up, middle)
        ctx.scale, ctx.factor, ctx.geometry = scale, factor, geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, middle = ctx.saved_tensors
        need_x, _, _, need_down, need_up = ctx.needs_input_grad[:5]
        factor = ctx.factor
        up = _cast(up, grad)
        grad_x = grad_down = grad_up = None
        if need_up:
            grad_up = torch.bmm(grad.flatten(2), middle.flatten(2).transpose(1, 2)).sum(0).mul_(factor)
        if need_x or need_down:
            inner = functional.conv2d(grad, up.t()[:, :, None, None])
            inner, _ = _scaled(inner, ctx.scale, grad.shape[0])
            inner = inner.mul_(factor)
            grad_x, grad_down = conv_backward(inner, x, _cast(down, grad), ctx.geometry, (need_x, need_down))
        if need_x:
            base, _ = conv_backward(grad, x, _cast(weight, grad), ctx.geometry, (True, False))
            if base is not None and grad_x is not None:
                grad_x = base.add_(grad_x)
        return grad_x, None, None, grad_down, grad_up, None, None


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a 2-D convolution for its input and its weight."""
    stride, padding, dilation = (_pair(value) for value in geometry)
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*need, False]
    )
    return grad_x, grad_w


def _scaled(middle: Tensor, scale: Scale, batch: int) -> tuple[Tensor, float]:
    """The rank-r middle with a scale per sample (and rank) applied, and the number that is still to be applied.

    The rank is the last axis of rows (…, r), and the second of pictures (B, r, …).
    """
    if not isinstance(scale, Tensor):
        return middle, scale
    if scale.shape[0] != batch:
        raise ValueError(f"the strength has {scale.shape[0]} values for a batch of {batch}")
    scale = scale.to(middle)
    if scale.ndim == 1:
        return (middle.reshape(batch, -1) * scale[:, None]).view(middle.shape), 1.0
    if middle.ndim == 2:
        return (middle.view(batch, -1, scale.shape[1]) * scale[:, None]).view(middle.shape), 1.0
    return middle * scale.view(*scale.shape, *(1,) * (middle.ndim - 2)), 1.0


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """A tensor (B,) shaped to multiply `like` (B, …) per sample, in its precision."""
    return values.to(like).view(-1, *(1 for _ in like.shape[1:]))


def scaled(update: Tensor, scale: Scale) -> Tensor:
    """An update (B, …) times a number, or times a tensor (B,) with one number for each sample."""
    return update * (per_sample(scale, update) if isinstance(scale, Tensor) else scale)


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def stride_area(geometry: Geometry | None) -> int:
    """By how much a convolution of this geometry has fewer outputs than inputs; 1 for a linear layer."""
    return 1 if geometry is None else math.prod(_pair(geometry[0]))
