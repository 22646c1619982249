"""Rotations from unconstrained blocks of numbers (OFT 2306.07280 eq. 3; BOFT 2311.06243 eq. 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import applied


def cayley_minus_identity(blocks: Tensor) -> Tensor:
    """R − 1 for R = (1 + Q)(1 − Q)⁻¹ with Q = B − Bᵀ, for blocks B (…, b, b), in float32; R − 1 = 2·Q·(1 − Q)⁻¹.

    1 − Q is never singular for an antisymmetric Q, so nothing has to be checked on the device.
    """
    return applied(Cayley, blocks)


class Cayley(torch.autograd.Function):
    """See `cayley_minus_identity`. With M = (1 − Q)⁻¹ = 1 + (R − 1)/2 it is dR = 2·M·dQ·M."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        skew = blocks.float() - blocks.float().transpose(-1, -2)
        identity = torch.eye(skew.shape[-1], device=skew.device)
        turns: Tensor = 2 * skew @ torch.linalg.inv_ex(identity - skew)[0]
        ctx.save_for_backward(turns)
        ctx.dtype = blocks.dtype
        return turns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (turns,) = ctx.saved_tensors
        back = turns.transpose(-1, -2) * 0.5
        back.diagonal(dim1=-2, dim2=-1).add_(1)
        moved = back @ grad.float() @ back
        found: Tensor = (2 * (moved - moved.transpose(-1, -2))).to(ctx.dtype)
        return found


def turn(outputs: Tensor, turns: Tensor) -> Tensor:
    """Each block of rows of `outputs` (n·b, N) times its own matrix of `turns` (n, b, b)."""
    pieces = outputs.unflatten(0, turns.shape[:2])
    return torch.bmm(turns.to(outputs.dtype), pieces).flatten(0, 1)


def butterfly(outputs: Tensor, turns: Tensor) -> Tensor:
    """Rotations one after the other on `outputs` (n·b, N), given as `turns` (m, n, b, b): rotation minus identity.

    Stage i regroups the rows with stride 2ⁱ·b/2, lets its n blocks act and puts the rows back. For the backward pass
    only the outputs before the first stage are kept; the stages are computed again.
    """
    return applied(Butterfly, outputs, turns)


class Butterfly(torch.autograd.Function):
    """See `butterfly`."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, turns)
        return _stages(outputs, turns.to(outputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outputs, turns = ctx.saved_tensors
        need_outputs, need_turns = ctx.needs_input_grad[:2]
        turned, met = turns.to(grad.dtype), list[Tensor]()
        if need_turns:
            _stages(outputs, turned, met)
        grad_turns, pieces = torch.empty_like(turns), _grouped(grad, turns, len(turns) - 1)
        for stage in reversed(range(len(turns))):
            if need_turns:
                grad_turns[stage] = torch.bmm(pieces, met.pop().transpose(1, 2))
            if stage or need_outputs:
                pieces = torch.baddbmm(pieces, turned[stage].transpose(1, 2), pieces)
            if stage:
                pieces = _regrouped(pieces, stage, stage - 1)
        grad_outputs = _ungrouped(pieces, 0).reshape(outputs.shape) if need_outputs else None
        return grad_outputs, grad_turns if need_turns else None


def _stages(rows: Tensor, turns: Tensor, met: list[Tensor] | None = None) -> Tensor:
    """The stages one after the other; `met` takes what each of them met, as (n, b, N)."""
    pieces = _grouped(rows, turns, 0)
    for stage, own in enumerate(turns):
        if stage:
            pieces = _regrouped(pieces, stage - 1, stage)
        if met is not None:
            met.append(pieces)
        pieces = torch.baddbmm(pieces, own, pieces)
    return _ungrouped(pieces, len(turns) - 1).reshape(rows.shape)


def _grouped(rows: Tensor, turns: Tensor, stage: int) -> Tensor:
    """Rows (n·b, N) as the groups (n, b, N) of a stage: out of 2·2ⁱ·b/2 rows, every one with the one half further."""
    _, count, size, _ = turns.shape
    half = size // 2 << stage
    return rows.reshape(-1, 2, half, rows.shape[1]).transpose(1, 2).reshape(count, size, -1)


def _ungrouped(pieces: Tensor, stage: int) -> Tensor:
    """The groups of a stage back in the order of rows, as a view (…, N)."""
    half = pieces.shape[1] // 2 << stage
    return pieces.view(-1, half, 2, pieces.shape[2]).transpose(1, 2)


def _regrouped(pieces: Tensor, old: int, new: int) -> Tensor:
    """From the groups of a stage to those of the next or the former one, in one copy."""
    count, size, width = pieces.shape
    half = size // 2 << min(old, new)
    # Up: (groups, which of two, place, half, N), two groups become one of twice the size; down: the same backwards.
    return pieces.view(-1, 2, half, 2, width).permute(0, 3, 2, 1, 4).reshape(count, size, width)
