"""A frozen layer with the update s·(A₁·B₁) ⊙ (A₂·B₂) without the dense ΔW where that is cheaper (2108.06098, prop. 1).

Number by number, (A₁·B₁) ⊙ (A₂·B₂) = U·D with U[o, ij] = A₁[o, i]·A₂[o, j] and D[ij, n] = B₁[i, n]·B₂[j, n]: a product
of rank r². A (out, r), B (r, in·k·k).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import applied
from .lowrank import Geometry, LowRankConv, LowRankLinear, Scale

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
PIECE = 1 << 17  # numbers of a dense ΔW that are made at a time: they stay in a processor's cache


def plain_factors(parts: Sequence[Tensor]) -> Factors:
    """The factors A₁, B₁, A₂, B₂ of a product from its tensors, of which the last two may be Tucker cores.

    Σ_ij core[i, j, …]·outer[i, p]·inner[j, q] = (outerᵀ·(core·inner))[p, q …].
    """
    a1, b1, a2, b2, *cores = parts
    if not cores:
        return a1, b1, a2, b2
    b1, b2 = (torch.einsum("ij...,jq->iq...", t, b).flatten(1) for t, b in zip(cores, (b1, b2), strict=True))
    return a1.T, b1, a2.T, b2


def hadamard_delta(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """(A₁·B₁) ⊙ (A₂·B₂), (out, in·k·k)."""
    return (a1 @ b1) * (a2 @ b2)


def thin_pays(rows: int, fan_in: int, fan_out: int, rank: int) -> bool:
    """Whether the way through rank r² costs less than the dense ΔW, in forward and backward.

    Counted in multiplications: through r², 3·rows·r²·(in + out); dense, the weight's gradient (rows·in·out) and eight
    products of rank r. The passes over memory count as 60 and 40 for each number (measured on a CPU).
    """
    square = rank * rank
    return (3 * rows + 40) * square * (fan_in + fan_out) < fan_in * fan_out * (rows + 8 * rank + 60)


def hadamard_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scale: Scale, geometry: Geometry | None = None
) -> Tensor:
    """W·x + b + s·(A₁·B₁ ⊙ A₂·B₂)·x in x's precision, through rank r²; gradients reach x and the factors.

    x: (B, …, in), or (B, in, h, w) with the `geometry` (stride, padding, dilation) of a convolution. s is a number, or
    a tensor (B,) with one for each sample. U and D are made again in the backward pass.
    """
    return applied(Hadamard, x, weight, bias, scale, geometry, *factors)


class Hadamard(torch.autograd.Function):
    """See `hadamard_layer`: a low-rank layer whose factors are not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Scale,
        geometry: Geometry | None,
        *factors: Tensor,
    ) -> Tensor:
        within, given = _Within(), (x, weight, bias, *_thin(weight, *factors), scale)
        if geometry is None:
            y: Tensor = LowRankLinear.forward(within, *given)
        else:
            y = LowRankConv.forward(within, *given, geometry)
        rows, _, _, _, middle = within.saved_tensors
        ctx.save_for_backward(rows, weight, middle, *factors)
        ctx.within, ctx.geometry, within.saved_tensors = within, geometry, ()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, middle, *factors = ctx.saved_tensors
        needs, within = ctx.needs_input_grad[5:], ctx.within
        with torch.enable_grad():
            given = [factor.detach().requires_grad_(need) for factor, need in zip(factors, needs, strict=True)]
            down, up = _thin(weight, *given)
        within.saved_tensors = rows, weight, down.detach(), up.detach(), middle
        within.needs_input_grad = (ctx.needs_input_grad[0], False, False, down.requires_grad, up.requires_grad)
        way = LowRankLinear if ctx.geometry is None else LowRankConv
        grad_x, _, _, grad_down, grad_up, *_ = way.backward(within, grad)
        within.saved_tensors = ()
        made = [(whole, its.to(whole.dtype)) for whole, its in ((down, grad_down), (up, grad_up)) if its is not None]
        wanted = [factor for factor, need in zip(given, needs, strict=True) if need]
        found: Iterator[Tensor] = iter(())
        if wanted:
            found = iter(torch.autograd.grad([whole for whole, _ in made], wanted, [its for _, its in made]))
        return grad_x, None, None, None, None, *(next(found) if need else None for need in needs)


class _Within:
    """What the low-rank layer is given as its context."""

    saved_tensors: tuple[Tensor, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _thin(weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """D (r², in[, k, k]) and U (out, r²)."""
    down, up = b1[:, None] * b2, a1[:, :, None] * a2[:, None]
    return down.view(-1, *weight.shape[1:]), up.flatten(1)


def hadamard_norms(weight: Tensor, factors: Factors, scale: float, on_input: bool) -> Tensor:
    """‖W + V‖² − ‖W‖² for each input or output, V = s·(A₁·B₁) ⊙ (A₂·B₂), float32; V is made in pieces of some rows."""
    a1, b1, a2, b2 = (factor.float() for factor in factors)
    flat, found = weight.flatten(1), []
    step = max(1, PIECE // flat.shape[1])
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        piece = (a1[rows] @ b1).mul_(a2[rows] @ b2).mul_(scale)
        piece = torch.add(piece, flat[rows].float(), alpha=2).mul_(piece)
        found.append(piece.sum(0) if on_input else piece.sum(1))
    if not on_input:
        return torch.cat(found)
    return torch.stack(found).sum(0).view(weight.shape[1], -1).sum(1)
