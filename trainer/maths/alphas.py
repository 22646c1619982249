"""Tables of ᾱ_t, the share of signal in x_t at each timestep of a diffusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_linear_alphas(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Tensor:
    """ᾱ_t (steps,) float32 of Stable Diffusion's schedule: √β linear from √beta_start to √beta_end."""
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def zero_terminal_snr(alphas_cumprod_T: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last value is 0 and the first is kept (Lin et al. 2305.08891, algorithm 1)."""
    root = alphas_cumprod_T.double().sqrt()
    first, last = root[0], root[-1]
    return (((root - last) * (first / (first - last))) ** 2).float()
