"""How images become noise, and what a model predicts on the way back: diffusion by a table of ᾱ, or a rectified flow.

Both mix clean latents z and noise ε, x_t = α_t·z + σ_t·ε. Everything else that depends on the kind of process is a
method here: nothing outside asks which one it is. Settings count timesteps from 0 (clean) to 1000 (noise); a process
has times of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .alphas import zero_terminal_snr

T = TypeVar("T", float, Tensor)

EPSILON, V_PREDICTION, FLOW = "epsilon", "v_prediction", "flow"
TIMESTEPS = 1000
"""The timestep of pure noise, as settings count."""
MAX_WEIGHT = 20.0
"""Highest weight of a noisy sample: a process may end without any signal."""


class NoiseProcess(Protocol):
    """A forward process and its prediction. Times are float (B,); latents, noise, x_t and predictions (B, C, H, W)."""

    @property
    def prediction(self) -> str:
        """What the model predicts: `epsilon`, `v_prediction` or `flow`."""

    @property
    def description(self) -> str:
        """The process in a few words, for a report."""

    @property
    def key(self) -> tuple[str | float, ...]:
        """What tells it from other processes, for caches."""

    @property
    def weightings(self) -> tuple[str, ...]:
        """The names that `loss_weight` takes."""

    @property
    def zero_snr(self) -> bool:
        """Whether this is a diffusion whose last time has no signal at all (zero-terminal SNR)."""

    @property
    def last(self) -> float:
        """The noisiest time."""

    def ending_in_noise(self) -> NoiseProcess:
        """This process, ending without any signal; itself when it does so."""

    def time(self, timestep: float) -> float:
        """The time of a timestep as settings count it."""

    def timesteps(self, t_B: Tensor) -> Tensor:
        """Times as settings count them, (B,): 0 clean, 1000 noise."""

    def draw_times(self, uniforms_B: Tensor, low: int, high: int) -> Tensor:
        """Times to train at from uniforms in [0, 1), (B,) float32, in the timesteps [low, high) of the settings; equal
        ones give that constant.
        """

    def model_time(self, t_B: Tensor) -> Tensor:
        """Times as the model takes them, (B,)."""

    def signal(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t), each broadcastable over `like` (B, …), on its device and in its precision."""

    def half_log_snr(self, time: float) -> float:
        """ln(α_t/σ_t) of one time; −∞ where there is no signal, ∞ where there is no noise."""

    def shows_image(self, time: float) -> bool:
        """Whether a prediction at this time says what the clean latents are: ε of pure noise does not."""

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = α_t·z + σ_t·ε."""

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What a perfect model predicts at x_t."""

    def x0(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latents implied by a prediction at x_t."""

    def noise(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise implied by a prediction at x_t."""

    def follow(self, predicted_BCHW: Tensor, shift_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """A prediction at x_t, carried over to the state x_t + α_t·shift of clean latents moved by `shift`: there it
        implies the same noise.
        """

    def loss_weight(self, name: str, t_B: Tensor) -> Tensor:
        """Loss weights by the name of a weighting, (B,) float32. Raises ValueError for a name not in `weightings`."""

    def is_flat(self, name: str) -> bool:
        """Whether a weighting of this name weights all times alike."""

    def min_snr(self, gamma: float, t_B: Tensor, always_epsilon: bool = False) -> Tensor:
        """Min-SNR-γ weights, (B,) float32; γ = 0 gives ones. Raises ValueError where the process has none."""

    def sampling_times(self, count: int) -> tuple[float, ...]:
        """Times to predict at when an image is sampled in `count` steps, noisiest first; fewer where there are none."""

    def spread_times(self, count: int) -> tuple[float, ...]:
        """`count` times spread over the whole process, noisiest first, the last one in the middle of its part: for
        states to look at, where no image is wanted.
        """


def _shaped(values_B: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in the precision of `like`, shaped (B, 1, …)."""
    return values_B.to(like.dtype).view(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class Diffusion:
    """x_t = √ᾱ_t·z + √(1−ᾱ_t)·ε for t = 0 … T−1 (Ho et al. 2006.11239, eq. 4). Times are whole numbers, kept as float.

    `prediction`: ε, or v = √ᾱ·ε − √(1−ᾱ)·z (Salimans & Ho 2202.00512, appendix D). Raises ValueError for another.

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
    def description(self) -> str:
        return self.prediction + (", zero-terminal SNR" if self.zero_snr else "")

    @property
    def key(self) -> tuple[str | float, ...]:
        return (self.prediction, float(self.alphas_cumprod_T[0]), float(self.alphas_cumprod_T[-1]))

    @property
    def weightings(self) -> tuple[str, ...]:
        return ("none", "debiased", "velocity")

    @property
    def zero_snr(self) -> bool:
        return float(self.alphas_cumprod_T[-1]) == 0.0

    @property
    def last(self) -> float:
        return float(len(self.alphas_cumprod_T) - 1)

    def ending_in_noise(self) -> Diffusion:
        if self.zero_snr:
            return self
        return Diffusion(zero_terminal_snr(self.alphas_cumprod_T), self.prediction)

    def time(self, timestep: float) -> float:
        return float(timestep)

    def timesteps(self, t_B: Tensor) -> Tensor:
        return t_B

    def draw_times(self, uniforms_B: Tensor, low: int, high: int) -> Tensor:
        return (low + (uniforms_B * (high - low)).floor().clamp_max(max(high - low - 1, 0))).float()

    def model_time(self, t_B: Tensor) -> Tensor:
        return t_B.long()

    def signal(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise, _ = self._on(like.device)
        t = t_B.to(like.device).long()
        return _shaped(signal[t], like), _shaped(noise[t], like)

    def half_log_snr(self, time: float) -> float:
        alpha = float(self.alphas_cumprod_T[int(time)])
        if not 0 < alpha < 1:
            return math.copysign(math.inf, alpha - 0.5)
        return 0.5 * math.log(alpha / (1 - alpha))

    def shows_image(self, time: float) -> bool:
        return self.prediction != EPSILON or float(self.alphas_cumprod_T[int(time)]) > 0

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, s = self.signal(t_B, latents_BCHW)
        return a * latents_BCHW + s * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        if self.prediction == EPSILON:
            return noise_BCHW
        a, s = self.signal(t_B, latents_BCHW)
        return a * noise_BCHW - s * latents_BCHW

    def x0(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latents implied by a prediction at x_t. With ε-prediction ᾱ_t must not be 0."""
        a, s = self.signal(t_B, x_BCHW)
        if self.prediction == EPSILON:
            return (x_BCHW - s * predicted_BCHW) / a
        return a * x_BCHW - s * predicted_BCHW

    def noise(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        if self.prediction == EPSILON:
            return predicted_BCHW
        a, s = self.signal(t_B, x_BCHW)
        return s * x_BCHW + a * predicted_BCHW

    def follow(self, predicted_BCHW: Tensor, shift_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """ε stays; v becomes v − √(1−ᾱ)·shift."""
        if self.prediction == EPSILON:
            return predicted_BCHW
        _, s = self.signal(t_B, predicted_BCHW)
        return predicted_BCHW - s * shift_BCHW

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ/(1−ᾱ), (B,) float32; 0 at the last time of zero-terminal SNR."""
        return self._on(t_B.device)[2][t_B.long()]

    def loss_weight(self, name: str, t_B: Tensor) -> Tensor:
        """`debiased` (Yu et al. 2310.08442): 1/√snr for ε, as in sd-scripts 1/(snr+1) for v. `velocity`, what makes a
        distance of ε one of v (2202.00512, section 4): (snr+1)/snr for ε, at most `MAX_WEIGHT`; ones for v.
        """
        if name == "debiased":
            snr = self.snr(t_B)
            if self.prediction == EPSILON:
                return (1 / snr.clamp(min=MAX_WEIGHT**-2, max=1000.0)).sqrt()
            return 1 / (snr + 1)
        if name == "velocity" and self.prediction == EPSILON:
            snr = self.snr(t_B)
            return ((snr + 1) / snr.clamp_min(1e-12)).clamp_max(MAX_WEIGHT)
        _check_weighting(name, self)
        return _ones(t_B)

    def is_flat(self, name: str) -> bool:
        return name == "none" or (name == "velocity" and self.prediction == V_PREDICTION)

    def min_snr(self, gamma: float, t_B: Tensor, always_epsilon: bool = False) -> Tensor:
        """Hang et al. 2303.09556, eq. 5: min(snr,γ)/snr for ε, min(snr,γ)/(snr+1) for v. `always_epsilon`: the ε weight
        for v too, as TrainTrain does.

        At zero SNR the ε weight tends to 1 and the v weight to 0; neither divides by zero.
        """
        if gamma == 0:
            return _ones(t_B)
        snr = self.snr(t_B)
        if always_epsilon or self.prediction == EPSILON:
            return torch.clamp(gamma / snr.clamp_min(1e-12), max=1.0)
        return snr.clamp_max(gamma) / (snr + 1)

    def sampling_times(self, count: int) -> tuple[float, ...]:
        """The last time of each of `count` equal parts (2305.08891, table 2: trailing)."""
        length = len(self.alphas_cumprod_T)
        times = (max(0, round(length - part * length / count) - 1) for part in range(count))
        return tuple(map(float, dict.fromkeys(times)))

    def spread_times(self, count: int) -> tuple[float, ...]:
        length = len(self.alphas_cumprod_T)
        return tuple(map(float, torch.linspace(length - 1, length / (2 * count), count).round().tolist()))

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


@dataclass(frozen=True)
class Flow:
    """x_t = (1−t)·z + t·ε for t from 0 to 1 (rectified flow, Liu et al. 2209.03003, eq. 1); the model predicts ε − z.

    `shift` s puts more of the times towards the noise, t ↦ s·t / (1 + (s−1)·t) (Esser et al. 2403.03206, eq. 23): those
    that are sampled at and those that are drawn. A shift by e^µ, as with a µ that follows the resolution, is the same.
    Raises ValueError unless it is above 0.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift {self.shift}: use a number above 0")

    @property
    def prediction(self) -> str:
        return FLOW

    @property
    def description(self) -> str:
        return f"{FLOW}, shift {self.shift:g}"

    @property
    def key(self) -> tuple[str | float, ...]:
        return (FLOW, self.shift)

    @property
    def weightings(self) -> tuple[str, ...]:
        return ("none",)

    @property
    def zero_snr(self) -> bool:
        return False

    @property
    def last(self) -> float:
        return 1.0

    def ending_in_noise(self) -> Flow:
        return self

    def time(self, timestep: float) -> float:
        return timestep / TIMESTEPS

    def timesteps(self, t_B: Tensor) -> Tensor:
        return t_B * TIMESTEPS

    def draw_times(self, uniforms_B: Tensor, low: int, high: int) -> Tensor:
        """The shifted distribution, cut to the range."""
        first, end = (self._unshifted(self.time(edge)) for edge in (low, high))
        u = first + uniforms_B * (end - first)
        return self._shifted(u).float()

    def model_time(self, t_B: Tensor) -> Tensor:
        return t_B

    def signal(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        t = _shaped(t_B.to(like.device), like)
        return 1 - t, t

    def half_log_snr(self, time: float) -> float:
        return math.log((1 - time) / time) if time < 1 else -math.inf

    def shows_image(self, time: float) -> bool:
        return True

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, s = self.signal(t_B, latents_BCHW)
        return a * latents_BCHW + s * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return noise_BCHW - latents_BCHW

    def x0(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        _, s = self.signal(t_B, x_BCHW)
        return x_BCHW - s * predicted_BCHW

    def noise(self, predicted_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, _ = self.signal(t_B, x_BCHW)
        return x_BCHW + a * predicted_BCHW

    def follow(self, predicted_BCHW: Tensor, shift_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """ε − z of the same noise and moved latents: v − shift, at every time."""
        return predicted_BCHW - shift_BCHW

    def loss_weight(self, name: str, t_B: Tensor) -> Tensor:
        """Ones: the loss of a velocity has its weights already, in the distribution of the times."""
        _check_weighting(name, self)
        return _ones(t_B)

    def is_flat(self, name: str) -> bool:
        return name == "none"

    def min_snr(self, gamma: float, t_B: Tensor, always_epsilon: bool = False) -> Tensor:
        if gamma != 0:
            raise ValueError(f"min-SNR with γ {gamma:g}: a flow has no such weights; use 0")
        return _ones(t_B)

    def sampling_times(self, count: int) -> tuple[float, ...]:
        return tuple(self._shifted(1 - part / count) for part in range(count))

    def spread_times(self, count: int) -> tuple[float, ...]:
        even = torch.linspace(1, 1 / (2 * count), count, dtype=torch.float64).tolist()
        return tuple(map(self._shifted, even))

    def _shifted(self, u: T) -> T:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _unshifted(self, time: float) -> float:
        return time / (self.shift - (self.shift - 1) * time)


def _ones(t_B: Tensor) -> Tensor:
    return torch.ones_like(t_B, dtype=torch.float32)


def _check_weighting(name: str, process: NoiseProcess) -> None:
    if name not in process.weightings:
        raise ValueError(f"weighting {name!r}: {process.description} has {', '.join(process.weightings)}")
