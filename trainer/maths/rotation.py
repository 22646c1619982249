"""Rotations from unconstrained blocks of numbers (OFT 2306.07280 eq. 3; BOFT 2311.06243 eq. 5)."""
from __future__ import annotations

import torch
from torch import Tensor


def cayley_minus_identity(blocks: Tensor) -> Tensor:
    """R − 1 for R = (1 + Q)(1 − Q)⁻¹ with Q = B − Bᵀ, for blocks B (…, b, b), in float32; R − 1 = 2·Q·(1 − Q)⁻¹.

    1 − Q is never singular for an antisymmetric Q, so nothing has to be checked on the device.
    """
    skew = blocks.float() - blocks.float().transpose(-1, -2)
    identity = torch.eye(skew.shape[-1], device=skew.device)
    inverse, _ = torch.linalg.inv_ex(identity - skew)
    return 2 * skew @ inverse


def butterfly(y: Tensor, turns: Tensor) -> Tensor:
    """Rotations minus the identity, `turns` (m, n, b, b), one stage after the other on outputs y (…, n·b).

    Stage i regroups the outputs with stride 2ⁱ·b/2 before its n blocks act and puts them back afterwards.
    """
    stages, count, size, _ = turns.shape
    for stage in range(stages):
        stride = 2**stage * (size // 2)
        grouped = y.unflatten(-1, (-1, 2, stride)).transpose(-1, -2).reshape(-1, count, size).transpose(0, 1)
        turned = grouped + torch.bmm(grouped, turns[stage].transpose(-1, -2).to(y.dtype))
        y = turned.transpose(0, 1).reshape(*y.shape[:-1], -1, stride, 2).transpose(-1, -2).reshape(y.shape)
    return y
