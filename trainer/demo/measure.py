"""Whether an adapter did what it should: measured on predictions, and on sampled pictures with the exact reader.

Notation: ε_κ(x, t, c) is the prediction with the adapter at strength κ, ε_0 the untouched model. All prediction
measures are averaged over held-out states x_t: pure noise, and states of the untouched model's own sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.network import Network
from ..engine.samples import SampleSettings, sample
from ..engine.samples import states as sampled
from ..maths import rng
from ..models.base import Conditioning, Model
from . import world
from .reader import Reading, read


@dataclass(frozen=True)
class Rate:
    """Hits out of trials with the 95 % interval of Wilson (1927)."""

    hits: int
    trials: int

    @property
    def value(self) -> float:
        """The share of hits, 0..1; 0 without trials."""
        return self.hits / self.trials if self.trials else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        n, p, z = self.trials, self.value, 1.959964
        if not n:
            return 0.0, 1.0
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """Plain numbers for a JSON line, rounded to four digits."""
        return {"rate": round(self.value, 4), "n": self.trials, "ci95": [round(bound, 4) for bound in self.interval]}


def share(hits: Iterable[bool]) -> Rate:
    """The rate of true values."""
    values = list(hits)
    return Rate(sum(values), len(values))


def ask(model: Model, prompts: Sequence[str], settings: SampleSettings) -> list[Reading]:
    """Sample one picture per prompt and read what it shows."""
    pictures = sample(model, prompts, settings)
    levels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return read(levels.permute(0, 2, 3, 1).numpy())


def agreement(scenes: Sequence[world.Scene], readings: Sequence[Reading]) -> dict[str, Rate]:
    """Per attribute, how often the picture shows what the scene says; an unreadable attribute is a miss."""
    return {
        name: share(
            getattr(reading, name) == getattr(scene, name) for scene, reading in zip(scenes, readings, strict=True)
        )
        for name in world.ATTRIBUTES
    }


@dataclass(frozen=True)
class State:
    """A batch of noisy latents x_t (B, C, H, W) at one timestep."""

    x: Tensor
    t: float


def held_out_states(
    model: Model, prompt: str, size: tuple[int, int], *, count: int = 8, seed: int = 90_001, lowest: int = 500
) -> list[State]:
    """Pure noise at four timesteps, and states of the untouched model's own sampling under `prompt`, t ≥ `lowest`.

    `size` is (height, width) in pixels. Must be called with the adapter at strength 0.
    """
    shape = (model.latent_channels, size[0] // 8, size[1] // 8)
    noise = rng.normal(shape, "held-out", seed, 0, range(count)).to(model.device)
    states = [State(noise, t) for t in torch.linspace(lowest, model.process.last, 4).round().tolist()]
    with torch.no_grad():
        rows = model.encode_prompts([prompt, ""])
    settings = SampleSettings(size=size, steps=12, cfg=4.0)

    for state in sampled(model, rows[:1].expand(count), rows[1:].expand(count), noise, settings):
        if state.time < lowest:
            break
        states.append(State(state.x, state.time))
    return states


class Probe:
    """Compares predictions of one adapted model with those of the untouched one on the given states.

    `known` remembers the untouched model's predictions by prompt; several probes on the same states may share it.
    """

    def __init__(
        self, model: Model, network: Network, states: Sequence[State], known: dict[str, list[Tensor]] | None = None
    ) -> None:
        self._model, self._network, self._states = model, network, states
        self._known: dict[str, list[Tensor]] = {} if known is None else known

    def _predictions(self, prompt: str, strength: float) -> list[Tensor]:
        if strength != 0:
            return self._predicted(prompt, strength)
        if prompt not in self._known:
            self._known[prompt] = self._predicted(prompt, 0.0)
        return self._known[prompt]

    @torch.no_grad()
    def _predicted(self, prompt: str, strength: float) -> list[Tensor]:
        with self._network.at_strength(strength):
            condition: Conditioning = self._model.encode_prompts([prompt])
            out = []
            for state in self._states:
                t = torch.full((len(state.x),), state.t, device=state.x.device)
                ids = self._model.time_ids(*self._sizes(state))
                rows = None if ids is None else ids.expand(len(state.x), -1).to(state.x.device)
                out.append(self._model.predict(state.x, t, condition.expand(len(state.x)), rows).float())
            return out

    @staticmethod
    def _sizes(state: State) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        size = (state.x.shape[-2] * 8, state.x.shape[-1] * 8)
        return size, (0, 0), size

    def gap(self, prompt: str, other: str, strength: float = 1.0) -> float:
        """Mean of ‖ε_strength(x, t, prompt) − ε_0(x, t, other)‖² over states and elements."""
        pairs = zip(self._predictions(prompt, strength), self._predictions(other, 0.0), strict=True)
        return sum(float((a - b).pow(2).mean()) for a, b in pairs) / len(self._states)

    def map_ratio(self, original: str, target: str, strength: float = 1.0) -> float:
        """M = 1 − ‖ε_1(c_o) − ε_0(c_t)‖² / ‖ε_0(c_o) − ε_0(c_t)‖²: 0 nothing learned, 1 perfect."""
        return 1 - self.gap(original, target, strength) / self.gap(original, target, 0.0)

    def leaks(self, original: str, target: str, unrelated: Sequence[str], strength: float = 1.0) -> dict[str, float]:
        """K(p) = ‖ε_1(p) − ε_0(p)‖² / ‖ε_0(c_o) − ε_0(c_t)‖² for every unrelated prompt."""
        whole = self.gap(original, target, 0.0)
        return {prompt: self.gap(prompt, prompt, strength) / whole for prompt in unrelated}


def memorisation(seen: Probe, unseen: Probe, original: str, target: str) -> float:
    """M on the states of training − M on held-out states: what was learned of the noise instead of the concept."""
    return seen.map_ratio(original, target) - unseen.map_ratio(original, target)


@dataclass(frozen=True)
class PairEffect:
    """How the change of the implied picture compares with the wanted one: cosine inside the mask, energy share
    outside.
    """

    cosine: float
    outside: float


def pair_effect(change_BCHW: Tensor, wanted_BCHW: Tensor, mask_B1HW: Tensor) -> PairEffect:
    """Compare the change of x̂0 with z_t − z_o; `mask` is 1 where the pictures of the pair differ."""
    inside, wanted = (change_BCHW * mask_B1HW).flatten(), (wanted_BCHW * mask_B1HW).flatten()
    cosine = torch.nn.functional.cosine_similarity(inside, wanted, dim=0)
    outside = (change_BCHW * (1 - mask_B1HW)).pow(2).sum() / change_BCHW.pow(2).sum().clamp_min(1e-12)
    return PairEffect(float(cosine), float(outside))


def first_reached(
    trace: Sequence[tuple[float, float, float]], map_at_least: float = 0.8, leak_at_most: float = 0.1
) -> float | None:
    """The first step (or second) of a trace of (step, map ratio, median leak) that reaches both, or None."""
    return next((at for at, mapped, leak in trace if mapped >= map_at_least and leak <= leak_at_most), None)
