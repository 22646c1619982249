"""Orthonormal bases of what a weight matrix does least or most, and low-rank products without the product itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .precise import double

EXACT_BELOW = 512
"""Matrices whose shorter side is at most this get an exact SVD where a truncated one would do."""


def least_rows(weight_OI: Tensor, count: int) -> Tensor:
    """`count` orthonormal rows v (count, in), float32, with ‖W·v‖ as small as it can be, smallest first.

    Where in − out ≥ count these are vectors of the true null space (W·v = 0), found as what a QR decomposition of Wᵀ
    leaves of fixed random vectors; otherwise the right singular vectors of the smallest singular values. Raises
    ValueError when `count` is above in.
    """
    fan_out, fan_in = weight_OI.shape
    if count > fan_in:
        raise ValueError(f"{count} orthonormal rows of length {fan_in}")
    if fan_in - fan_out >= count:
        weight = weight_OI.float()
        span = torch.linalg.qr(weight.T).Q
        seeds = torch.randn(fan_in, count, generator=torch.Generator().manual_seed(0)).to(weight)
        for _ in range(2):  # the second pass removes what rounding left of the first
            seeds = torch.linalg.qr(seeds - span @ (span.T @ seeds)).Q
        return seeds.T.contiguous()
    weight = double(weight_OI)
    least: Tensor = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, :count].T
    return least.float().contiguous().to(weight_OI.device)


def least_columns(weight_OI: Tensor, count: int) -> Tensor:
    """`count` orthonormal columns u (out, count) with ‖uᵀ·W‖ as small as it can be; see `least_rows`."""
    return least_rows(weight_OI.T, count).T.contiguous()


def truncated_svd(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r), V (r, in) of the largest singular values, float32, r = min(rank, out, in).

    Large matrices go through a random projection with power iterations (Halko et al. 0909.4061, algorithm 4.4) from
    fixed random vectors: the same matrix always gives the same factors.
    """
    matrix = matrix_OI.float()
    short = min(matrix.shape)
    rank = min(rank, short)
    if short <= max(EXACT_BELOW, 2 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        count = min(short, rank + max(16, rank // 2))
        seeds = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0)).to(matrix)
        basis = torch.linalg.qr(matrix @ seeds).Q
        for _ in range(4):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    return u[:, :rank], s[:rank], v[:rank]


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖U·D‖ (Frobenius), 0-d: √tr(UᵀU·DDᵀ) with D (r, in) and U (out, r)."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k), V (k, in) of the product of up (out, r) and down (r, in), k = min(r, out, in).

    Through QR decompositions of the factors: the product is never formed, and how it is split between them is nothing.
    """
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, v @ right.Q.T


def is_orthonormal(rows: Tensor, tolerance: float = 1e-2) -> bool:
    """Whether rows (k, n) are orthonormal within a tolerance per entry of their Gram matrix."""
    return bool((rows @ rows.T - torch.eye(len(rows), device=rows.device)).abs().max() <= tolerance)
