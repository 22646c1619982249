"""Storage and compute precision: frozen weights stay as they are stored and are cast at each call.

For the backward pass the *stored* weight is kept and cast again, so that fp16 storage with float32 compute needs no
second copy of the model. Modules whose weights are already in the compute precision are left alone.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import grad as grad_of

_MARK = "_casts_to"
_GRADIENTS: Any = grad_of  # untyped in torch


def compute_dtype(device: torch.device | str, storage: torch.dtype) -> torch.dtype:
    """The precision to compute in: float32 on a CPU (fp16 arithmetic is many times slower there), else the
    storage's."""
    return torch.float32 if torch.device(device).type == "cpu" else storage


def install(root: nn.Module, compute: torch.dtype) -> int:
    """Make every layer below `root` that is stored in another precision cast per call; returns how many do.

    A layer already in the compute precision gets its plain forward back. The cast is an instance attribute `forward`,
    so an adapter that replaces `forward` of one layer can call it as the base layer.
    """
    casting = 0
    for module in root.modules():
        kind = next((kind for kind in _FORWARDS if isinstance(module, kind)), None)
        if kind is None:
            continue
        remove(module)
        stored = module.weight
        if isinstance(stored, Tensor) and stored.dtype != compute:
            setattr(module, _MARK, compute)
            setattr(module, "forward", MethodType(_FORWARDS[kind], module))  # noqa: B010 - mypy: it is a method there
            casting += 1
    return casting


def remove(module: nn.Module) -> None:
    """Give one layer its plain forward back, if it casts."""
    if _MARK in module.__dict__:
        del module.__dict__[_MARK]
        module.__dict__.pop("forward", None)


class CastLinear(torch.autograd.Function):
    """y = x·Wᵀ + b in x's precision, with W kept in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_b = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b


class CastConv2d(torch.autograd.Function):
    """A 2-D convolution in x's precision, with the weight kept in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.x_shape, ctx.geometry = x.shape, geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        return functional.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _GRADIENTS.conv2d_input(ctx.x_shape, weight.to(grad.dtype), grad, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_w = _GRADIENTS.conv2d_weight(x, weight.shape, grad, *ctx.geometry).to(weight.dtype)
        grad_b = grad.sum((0, 2, 3)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _linear(self: nn.Linear, x: Tensor) -> Any:
    return _apply(CastLinear, x.to(getattr(self, _MARK)), self.weight, self.bias)


def _conv2d(self: nn.Conv2d, x: Tensor) -> Any:
    geometry = (self.stride, self.padding, self.dilation, self.groups)
    return _apply(CastConv2d, x.to(getattr(self, _MARK)), self.weight, self.bias, geometry)


def _group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    dtype = getattr(self, _MARK)
    return functional.group_norm(x.to(dtype), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)


def _layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    dtype = getattr(self, _MARK)
    bias = None if self.bias is None else self.bias.to(dtype)
    return functional.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), bias, self.eps)


def _embedding(self: nn.Embedding, ids: Tensor) -> Tensor:
    return functional.embedding(ids, self.weight, self.padding_idx).to(getattr(self, _MARK))


_FORWARDS: dict[type[nn.Module], Any] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
