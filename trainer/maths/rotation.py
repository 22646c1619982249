"""Rotations from unconstrained blocks of numbers (OFT 2306.07280 eq. 3; BOFT 2311.06243 eq. 5)."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cayley_minus_identity(blocks: Tensor) -> Tensor:
    """R − 1 for R = (1 + Q)(1 − Q)⁻¹ with Q = B − Bᵀ, for blocks B (…, b, b), in float32; R − 1 = 2·Q·(1 − Q)⁻¹.

    1 − Q is never singular for an antisymmetric Q, so nothing has to be checked on the device.
    """
    skew = blocks.float() - blocks.float().transpose(-1, -2)
    identity = torch.eye(skew.shape[-1], device=skew.device)
    inverse, _ = torch.linalg.inv_ex(identity - skew)
    return 2 * skew @ inverse


def turn(outputs: Tensor, turns: Tensor) -> Tensor:
    """Each block of rows of `outputs` (n·b, N) times its own matrix of `turns` (n, b, b)."""
    pieces = outputs.unflatten(0, turns.shape[:2])
    return torch.bmm(turns.to(outputs.dtype), pieces).flatten(0, 1)


def butterfly(outputs: Tensor, turns: Tensor) -> Tensor:
    """Rotations one after the other on `outputs` (n·b, N), given as `turns` (m, n, b, b): rotation minus identity.

    Stage i regroups the rows with stride 2ⁱ·b/2, lets its n blocks act and puts the rows back. For the backward pass
    only the outputs before the first stage are kept; the stages are computed again.
    """
    turned: Tensor = Butterfly.apply(outputs, turns)
    return turned


class Butterfly(torch.autograd.Function):
    """See `butterfly`."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, turns)
        return _stages(outputs, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        with torch.enable_grad():
            given = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            turned = _stages(*given)
        found = iter(torch.autograd.grad(turned, [t for t in given if t.requires_grad], grad))
        return tuple(next(found) if need else None for need in needed)


def _stages(rows: Tensor, turns: Tensor) -> Tensor:
    """Putting the rows back and regrouping them for the next stage are one copy."""
    stages, count, size, _ = turns.shape
    stride, width = size // 2, rows.shape[1]
    pieces = rows.reshape(count, 2, stride, width).transpose(1, 2)  # (groups, stride, halves, N)
    for stage in range(stages):
        if stage:
            stride *= 2
            split = pieces.view(-1, 2, stride // 2, 2, width)  # (groups, which of two, old stride, old halves, N)
            pieces = split.permute(0, 3, 2, 1, 4)
        grouped = pieces.reshape(count, size, width)
        pieces = torch.baddbmm(grouped, turns[stage].to(rows.dtype), grouped).view(-1, stride, 2, width)
    return pieces.transpose(1, 2).reshape(rows.shape)
