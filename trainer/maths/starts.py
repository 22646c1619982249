"""Where a low-rank adapter may start beside "random down, zero up": factors of the weight or of its first gradient.

Every function takes a matrix (out, in) in float32, the rank r and the scale s = alpha/rank the adapter multiplies with,
and gives down (r, in) and up (out, r). The adapter then learns s·(U·D − U₀·D₀), which is zero at the start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precise import double

EXACT_UP_TO = 256
_OVERSAMPLED, _ITERATIONS = 16, 8


def largest_directions(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """PiSSA (2404.02948, eq. 2–3): s·U·D is the best rank-r approximation of the weight, its roots on both sides."""
    up, values, down = top_singular(weight, rank, generator)
    root = (values / scale).sqrt()
    return root[:, None] * down, up * root


def smallest_directions(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """MiLoRA (2406.09044, eq. 5): the same with the r smallest singular values (of min(out, in)).

    From the eigenvectors of the smaller Gram matrix in float64, which is several times faster than a whole SVD.
    """
    wide = double(weight)
    turned = wide.shape[0] > wide.shape[1]
    rows = wide.T if turned else wide
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    near = vectors[:, :rank]
    far = near.T @ rows  # its rows are singular value × singular vector
    values = far.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    root = (values / scale).sqrt()
    up, down = near * root, far * (root / values)[:, None]
    if turned:
        up, down = down.T, up.T
    return down.to(weight), up.to(weight)


def orthonormal_rows(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA (2406.01775, eq. 3): U the first r columns of Q, D the first r rows of R of the weight's QR decomposition.

    The first r columns of Q depend on the first r columns of the weight alone.
    """
    up = torch.linalg.qr(weight[:, :rank]).Q
    return up.T @ weight, up


def first_gradient(
    gradient: Tensor, rank: int, generator: torch.Generator, gamma: float = 16.0
) -> tuple[Tensor, Tensor]:
    """LoRA-GA (2407.05000, theorem 3.1 and section 3.3): D from the first r right singular vectors of the gradient, U
    from the next r left ones, both times ⁴√out / √γ, so that the first step of both follows the full gradient.
    """
    up, _, down = top_singular(gradient, 2 * rank, generator)
    size = gradient.shape[0] ** 0.25 / math.sqrt(gamma)
    return down[:rank] * size, up[:, -min(rank, up.shape[1]) :] * size


def top_singular(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` (at most min(out, in)) singular triplets: (out, k), (k,), (k, in).

    Small matrices exactly; others by subspace iteration from a random start (Halko et al. 0909.4061, algorithm 4.4).
    """
    smaller = min(matrix.shape)
    count = min(count, smaller)
    width = count + _OVERSAMPLED
    if smaller <= EXACT_UP_TO or 2 * width >= smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count], right[:count]
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], values[:count], right[:count]
