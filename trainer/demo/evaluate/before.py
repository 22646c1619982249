"""What the untouched model draws and predicts, remembered: many scenarios compare with the same pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ...adapters.folded import folded
from .. import world
from ..effect import SETTINGS
from ..measure import Probe, Rate, State, ask, held_out_states, share
from ..reader import Reading
from .scenario import Trained

DRAWN = dataclasses.replace(SETTINGS, steps=12)
"""How pictures are drawn for the figures: in few steps, since a sweep draws thousands."""


class Before:
    """Readings, states and predictions of the untouched model, made once for all the scenarios that ask the same."""

    def __init__(self) -> None:
        self._readings: dict[tuple[str, ...], list[Reading]] = {}
        self._states: dict[tuple[str, int], list[State]] = {}
        self._predicted: dict[tuple[str, int], dict[str, list[Tensor]]] = {}

    def readings(self, trained: Trained, prompts: Sequence[str]) -> list[Reading]:
        """What pictures of these prompts show without the adapter, from the same noise as `after`'s."""
        key = tuple(prompts)
        if key not in self._readings:
            self._readings[key] = drawn(trained, prompts, 0.0)
        return self._readings[key]

    def probe(self, trained: Trained, prompt: str, count: int) -> Probe:
        """A probe on held-out states of `prompt` that knows the untouched model's predictions already made there."""
        key = (prompt, count)
        if key not in self._states:
            with trained.network.at_strength(0.0):
                self._states[key] = held_out_states(trained.model, prompt, (world.EDGE, world.EDGE), count=count)
        known = self._predicted.setdefault(key, {})
        return Probe(trained.model, trained.network, self._states[key], known)


def drawn(trained: Trained, prompts: Sequence[str], strength: float) -> list[Reading]:
    """What pictures of these prompts show with the adapter at a strength."""
    with folded(trained.network, strength) if strength else trained.network.at_strength(0.0):
        return ask(trained.model, prompts, DRAWN)


def kept(name: str, before: Sequence[Reading], after: Sequence[Reading], asked: Sequence[world.Scene]) -> Rate:
    """Of the pictures that showed the asked value of an attribute before, how many still do."""
    rows = zip(before, after, asked, strict=True)
    pairs = [(getattr(now, name), getattr(scene, name)) for then, now, scene in rows
             if getattr(then, name) == getattr(scene, name)]  # fmt: skip
    return share(now == wanted for now, wanted in pairs)


def pool(chosen: Callable[[world.Scene], bool], count: int, seed: int) -> list[world.Scene]:
    """`count` random scenes among those of the base model's training that are `chosen`."""
    found = [scene for scene in world.all_scenes() if world.in_base(scene) and chosen(scene)]
    return [found[index] for index in np.random.default_rng(seed).integers(0, len(found), count)]


def around(rate: float) -> tuple[float, ...]:
    """The five learning rates of a sweep, in steps of about 1.7."""
    return tuple(float(f"{rate * factor:.2g}") for factor in (0.3, 0.6, 1.0, 1.7, 3.0))


def step_of(path: Path) -> int:
    """The step at which a file on the way was written."""
    return int(path.stem.rpartition("_")[2].removesuffix("steps"))
