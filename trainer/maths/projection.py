"""The part of a change that points along a given difference, place by place."""

from __future__ import annotations

from torch import Tensor

RIDGE = 0.01
"""Share of the largest squared difference that a place must have to count by half."""


def along(change_BCHW: Tensor, difference_BCHW: Tensor) -> Tensor:
    """The change's projection on the difference at each place, (B, C, H, W): d·⟨Δ, d⟩ / (|d|² + r), channels summed.

    The ridge r is RIDGE × the sample's largest |d|²: where d is a hundredth of its largest length, a ten-thousandth of
    the change's energy is left, however small the part of the picture is that differs; where d is zero, nothing.
    """
    energy = difference_BCHW.square().sum(1, keepdim=True)
    ridge = RIDGE * energy.amax((2, 3), keepdim=True)
    share = (change_BCHW * difference_BCHW).sum(1, keepdim=True) / (energy + ridge).clamp_min(1e-12)
    return difference_BCHW * share
