"""Per-sample losses, their weights, and timestep samplers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .schedule import EPSILON, NoiseSchedule

DISTANCES: dict[str, Callable[..., Tensor]] = {
    "MSE": F.mse_loss,
    "L1": F.l1_loss,
    "Smooth-L1": F.smooth_l1_loss,
}

MOST = 20.0
"""Highest weight of a noisy sample: a schedule may end without any signal."""


def distance(name: str, predicted_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean distance per sample, (B,) float32. A mask weights the elements and is normalised by its own mean."""
    loss = DISTANCES[name](predicted_BCHW.float(), target_BCHW.float(), reduction="none")
    if mask_B1HW is not None:
        loss = loss * (mask_B1HW / mask_B1HW.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6))
    return loss.flatten(1).mean(1)


def min_snr_weight(schedule: NoiseSchedule, t_B: Tensor, gamma: float, always_epsilon: bool = False) -> Tensor:
    """Min-SNR-γ (Hang et al. 2303.09556, eq. 5), (B,): min(snr,γ)/snr for ε, min(snr,γ)/(snr+1) for v; γ = 0 gives
    ones. `always_epsilon`: the ε weight for v too, as TrainTrain does.

    At zero SNR the ε weight tends to 1 and the v weight to 0; neither divides by zero.
    """
    snr = schedule.snr(t_B)
    if gamma == 0:
        return torch.ones_like(snr)
    if always_epsilon or schedule.prediction == EPSILON:
        return torch.clamp(gamma / snr.clamp_min(1e-12), max=1.0)
    return snr.clamp_max(gamma) / (snr + 1)


def debiased_weight(schedule: NoiseSchedule, t_B: Tensor) -> Tensor:
    """Debiased estimation (Yu et al. 2310.08442), (B,): 1/√snr for ε, as in sd-scripts 1/(snr+1) for v."""
    snr = schedule.snr(t_B)
    if schedule.prediction == EPSILON:
        return (1 / snr.clamp(min=MOST**-2, max=1000.0)).sqrt()
    return 1 / (snr + 1)


def velocity_weight(schedule: NoiseSchedule, t_B: Tensor) -> Tensor:
    """What makes a distance of ε one of v (Salimans & Ho 2202.00512, section 4), (B,): (snr+1)/snr, at most `MOST`;
    ones for v.
    """
    snr = schedule.snr(t_B)
    if schedule.prediction == EPSILON:
        return ((snr + 1) / snr.clamp_min(1e-12)).clamp_max(MOST)
    return torch.ones_like(snr)


WEIGHTS: dict[str, Callable[[NoiseSchedule, Tensor], Tensor]] = {
    "none": lambda schedule, t_B: torch.ones_like(schedule.snr(t_B)),
    "debiased": debiased_weight,
    "velocity": velocity_weight,
}


def uniform_timesteps(uniforms_B: Tensor, low: int, high: int) -> Tensor:
    """Integers in [low, high) from uniforms in [0, 1), (B,) int64; low == high gives that constant."""
    return (low + (uniforms_B * (high - low)).floor().clamp_max(max(high - low - 1, 0))).long()
