"""DoRA's decomposition of a weight into magnitudes and directions (2402.09353, eq. 5)."""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-12
"""The least norm that is divided by."""


def norms_along(weight: Tensor, axis: int) -> Tensor:
    """‖·‖ of a weight (out, in[, k, k]) for each output (axis 0) or input (axis 1)."""
    over = [other for other in range(weight.ndim) if other != axis]
    return weight.square().sum(over).sqrt()


def on_axis(values: Tensor, dims: int, axis: int) -> Tensor:
    """One number for each output (out, 1[, 1, 1]) or input (1, in[, 1, 1]), as files have it."""
    shape = [1] * dims
    shape[axis] = -1
    return values.view(shape)


def magnitude_axis(magnitude: Tensor, weight: Tensor) -> int:
    """Which of a weight's axes the magnitudes of a file belong to. Raises ValueError when they fit neither."""
    for axis in (1, 0):
        if magnitude.ndim > 1 and magnitude.shape[axis] == magnitude.numel() == weight.shape[axis]:
            return axis
    raise ValueError(f"magnitudes of the shape {list(magnitude.shape)}")


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """W′ = m ⊙ (W + V) / ‖W + V‖ for a change V; the shape of m says whether by inputs or by outputs."""
    axis, total = magnitude_axis(magnitude, weight), weight + change
    ratio = magnitude.flatten() / norms_along(total, axis).clamp_min(SMALLEST)
    return total * on_axis(ratio, weight.ndim, axis)
