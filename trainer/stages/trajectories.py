"""What the untouched model meets while it draws: the inputs of stages that ask how it behaves on ordinary prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths import rng
from ..maths.sampling import sampling
from ..modes.prompts import written_lines
from .base import Preparation

GENERIC = (
    "", "a photo", "a painting", "a portrait of a person", "an animal", "a landscape", "a building", "a plate",
    "a black and white drawing", "a street at night", "a car",
)  # fmt: skip
"""Ordinary prompts for who gives none."""


@dataclass(frozen=True)
class State:
    """One state of one picture: x_t (1, C, H, W), its time (1,), the prompt, SDXL's sizes, the right prediction."""

    x: Tensor
    t: Tensor
    prompt: str
    time_ids: Tensor | None
    target: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this state alone takes; the sizes are shared with others."""
        return sum(tensor.nbytes for tensor in (self.x, self.t, self.target) if tensor is not None)

    def to(self, device: torch.device | str) -> State:
        """The same on another device."""
        ids, target = (None if one is None else one.to(device) for one in (self.time_ids, self.target))
        return State(self.x.to(device), self.t.to(device), self.prompt, ids, target)


def lines(text: str) -> tuple[str, ...]:
    """The prompts of a field with one prompt per line; the generic ones when it is empty."""
    return written_lines(text) or GENERIC


@torch.no_grad()
def trajectories(
    at: Preparation,
    prompts: Sequence[str],
    steps: int,
    purpose: str,
    answered: bool = False,
    highest: int | None = None,
) -> Iterator[State]:
    """The states that the untouched model passes when it draws each prompt without guidance, `steps` for each prompt.

    `answered` ones have what it predicts there as their target. Those above the timestep `highest` are left out.

    The steps are DDIM's from pure noise, so that every x_t is one the model was trained on. Each prompt is drawn alone:
    memory stays that of one picture. The kit's `rollout` is for the batches of a mode: its own prompts, the job's range
    of timesteps, draws that belong to the samples, and all states at once.
    """
    first = at.batch(0)
    if first is None:
        return
    kit, process = at.kit, at.kit.process
    times = process.spread_times(steps)
    limit = math.inf if highest is None else process.time(highest)
    ids = None if first.time_ids is None else first.time_ids[:1]
    for index, prompt in enumerate(prompts):
        with kit.strength(0.0):
            conditioning = kit.text((prompt,))

        def predict(x: Tensor, t_B: Tensor, conditioning: Any = conditioning) -> Tensor:
            with kit.teacher():
                return kit.predict(x, t_B, conditioning, ids).float()

        x = rng.normal(first.mean.shape[1:], purpose, at.seed, 0, (index,)).to(first.mean.device)
        if answered:
            states = (state for state in sampling(process, predict, x, times, order=1) if state.predicted is not None)
        else:  # the last one is only arrived at
            states = sampling(process, predict, x, times[:-1], order=1, until=times[-1])
        for state in states:
            if state.time <= limit:
                yield State(state.x, state.t, prompt, ids, state.predicted if answered else None)
