"""The forward diffusion process: x_t = √ᾱ_t·z + √(1−ᾱ_t)·ε (Ho et al. 2006.11239, eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

EPSILON, V_PREDICTION = "epsilon", "v_prediction"


def scaled_linear_alphas(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Tensor:
    """ᾱ_t (steps,) float32 of Stable Diffusion's schedule: √β linear from √beta_start to √beta_end."""
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def zero_terminal_snr(alphas_cumprod_T: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last value is 0 and the first is kept (Lin et al. 2305.08891, algorithm 1)."""
    root = alphas_cumprod_T.double().sqrt()
    first, last = root[0], root[-1]
    return (((root - last) * (first / (first - last))) ** 2).float()


def _per_sample(values_T: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
    """values[t], both on the device of `like`, shaped (B, 1, …) and in its dtype."""
    return values_T[t_B].to(like.dtype).view(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t for t = 0 … T−1 and what the model predicts: `epsilon` or `v_prediction`.

    √ᾱ, √(1−ᾱ) and the SNR are computed once, in float64 on the CPU, and kept as float32 tables on every device that
    asks for them: no step copies one, and no float64 reaches a device.
    """

    alphas_cumprod_T: Tensor
    prediction: str = EPSILON
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.prediction not in (EPSILON, V_PREDICTION):
            raise ValueError(f"prediction {self.prediction!r}: use {EPSILON!r} or {V_PREDICTION!r}")

    @property
    def zero_snr(self) -> bool:
        """Whether the last step has no signal at all."""
        return float(self.alphas_cumprod_T[-1]) == 0.0

    def ending_in_noise(self) -> NoiseSchedule:
        """This schedule with zero-terminal SNR; itself when it has that."""
        if self.zero_snr:
            return self
        return NoiseSchedule(zero_terminal_snr(self.alphas_cumprod_T), self.prediction)

    def __len__(self) -> int:
        return len(self.alphas_cumprod_T)

    def signal(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1−ᾱ_t)), each broadcastable over `like` (B, …)."""
        signal, noise, _ = self._on(like.device)
        t = t_B.to(like.device)
        return _per_sample(signal, t, like), _per_sample(noise, t, like)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t from clean latents and noise, (B, C, H, W)."""
        a, s = self.signal(t_B, latents_BCHW)
        return a * latents_BCHW + s * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What a perfect model predicts: ε, or v = √ᾱ·ε − √(1−ᾱ)·z (Salimans & Ho 2202.00512, appendix D)."""
        if self.prediction == EPSILON:
            return noise_BCHW
        a, s = self.signal(t_B, latents_BCHW)
        return a * noise_BCHW - s * latents_BCHW

    def follow(self, predicted_BCHW: Tensor, shift_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """A prediction at x_t, carried over to the state x_t + √ᾱ·shift of clean latents moved by `shift`: there it
        implies the same noise. ε stays; v becomes v − √(1−ᾱ)·shift.
        """
        if self.prediction == EPSILON:
            return predicted_BCHW
        _, s = self.signal(t_B, predicted_BCHW)
        return predicted_BCHW - s * shift_BCHW

    def x0(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latents implied by a prediction at x_t. With ε-prediction ᾱ_t must not be 0."""
        a, s = self.signal(t_B, x_BCHW)
        if self.prediction == EPSILON:
            return (x_BCHW - s * predicted_BCHW) / a
        return a * x_BCHW - s * predicted_BCHW

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ/(1−ᾱ), (B,) float32; 0 at the last step of a zero-terminal-SNR schedule."""
        return self._on(t_B.device)[2][t_B]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(√ᾱ, √(1−ᾱ), SNR), each (T,) float32 on a device."""
        if device not in self._tables:
            alphas = self.alphas_cumprod_T.detach().cpu().double()
            signal, noise, snr = (
                table.float().to(device) for table in (alphas.sqrt(), (1 - alphas).sqrt(), alphas / (1 - alphas))
            )
            if isinstance(signal, FakeTensor):  # a prediction of memory must leave nothing behind
                return signal, noise, snr
            self._tables[device] = signal, noise, snr
        return self._tables[device]
