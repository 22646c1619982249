"""How far an adapter moves what it should leave alone: predictions, signs of gates and pictures of known words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...adapters.folded import folded
from ...maths import rng
from ...models.base import Conditioning, Model
from ...stages.abm import listening
from .. import world
from ..effect import SETTINGS, concept_scenes, unrelated_scenes
from ..measure import Rate, agreement, ask, share
from .scenario import Trained

DRAWN = dataclasses.replace(SETTINGS, steps=5)
"""How pictures are drawn for the figures: 5 steps read nearly as well as 12 on the shipped base model."""

STATES = 32


@dataclass(frozen=True)
class Untouched:
    """What the untouched model predicts for pictures of known words: x_t, timesteps, conditioning, the prediction, how
    far the prompts move it (mean square), and the gates' pre-activations."""

    x_BCHW: Tensor
    t_B: Tensor
    condition: Conditioning
    predicted_BCHW: Tensor
    moved: float
    gates: tuple[Tensor, ...]


@dataclass(frozen=True)
class Drift:
    """`moved`: mean square by which predictions for known words change, relative to what their prompts do to them (0:
    nothing is forgotten); `signs`: share of the gates' signs that stay."""

    moved: float
    signs: float


class Meter:
    """Figures of adapters on one model; what the untouched model does is found once."""

    def __init__(self, asked: int, unrelated: int) -> None:
        self._concept, self._others = concept_scenes(asked), unrelated_scenes(unrelated)
        self._before: dict[str, Rate] = {}
        self._untouched: Untouched | None = None
        self._asked_before: float | None = None

    def asked(self, trained: Trained) -> Rate:
        """How often prompts with the new word show its shape."""
        with folded(trained.network):
            return self._asked(trained.model)

    def asked_before(self, trained: Trained) -> float:
        """The same of the untouched model."""
        if self._asked_before is None:
            with trained.network.at_strength(0.0):
                self._asked_before = self._asked(trained.model).value
        return self._asked_before

    def _asked(self, model: Model) -> Rate:
        readings = ask(model, [world.caption(scene) for scene in self._concept], DRAWN)
        return share(reading.shape == world.HELD_OUT_SHAPE for reading in readings)

    def fall(self, trained: Trained) -> float:
        """The largest loss of any attribute over pictures of known words, 0..1 (below 0: it got better)."""
        prompts = [world.caption(scene) for scene in self._others]
        if not self._before:
            with trained.network.at_strength(0.0):
                self._before = agreement(self._others, ask(trained.model, prompts, DRAWN))
        with folded(trained.network):
            after = agreement(self._others, ask(trained.model, prompts, DRAWN))
        return max(self._before[name].value - after[name].value for name in world.ATTRIBUTES)

    @torch.no_grad()
    def drift(self, trained: Trained) -> Drift:
        """How far predictions and gates move on noised pictures of known words."""
        if self._untouched is None:
            with trained.network.at_strength(0.0):
                self._untouched = untouched(trained.model, unrelated_scenes(STATES, seed=9))
        known = self._untouched
        with folded(trained.network):
            predicted, gates = _predict(trained.model, known.x_BCHW, known.t_B, known.condition)
        kept = [((one > 0) == (two > 0)).float().mean() for one, two in zip(gates, known.gates, strict=True)]
        moved = float((predicted - known.predicted_BCHW).square().mean()) / known.moved
        return Drift(moved, float(torch.stack(kept).mean()))


@torch.no_grad()
def untouched(model: Model, scenes: Sequence[world.Scene], seed: int = 4) -> Untouched:
    """Noised pictures of the scenes, timesteps evenly spread, and what the model as it stands predicts for them."""
    pictures = torch.from_numpy(world.render(list(scenes), np.random.default_rng(seed))).permute(0, 3, 1, 2)
    latents = model.encode_images(pictures / 127.5 - 1)[0]
    count = len(scenes)
    noise = rng.normal(latents.shape[1:], "drift", seed, 0, range(count)).to(latents)
    t = torch.linspace(20, model.process.last - 19, count).round().to(latents.device)
    x = model.process.add_noise(latents, noise, t)
    condition = model.encode_prompts([world.caption(scene) for scene in scenes])
    predicted, gates = _predict(model, x, t, condition)
    empty, _ = _predict(model, x, t, model.encode_prompts([""]).expand(count))
    return Untouched(x, t, condition, predicted, float((predicted - empty).square().mean()), gates)


def _predict(model: Model, x: Tensor, t: Tensor, condition: Conditioning) -> tuple[Tensor, tuple[Tensor, ...]]:
    with listening(model.gates) as heard:
        predicted = model.predict(x, t, condition).float()
    return predicted, tuple(heard)


def at_success(points: Mapping[float, float], success: float) -> float:
    """A figure at a success that was not met exactly: on the line through the neighbours below and above.

    `points`: success → figure, the largest one at or above `success`.
    """
    above = min(value for value in points if value >= success)
    below = max((value for value in points if value < success), default=above)
    if above == below:
        return points[above]
    share_above = (success - below) / (above - below)
    return points[below] + share_above * (points[above] - points[below])
