"""What the untouched model meets while it draws: the inputs of stages that ask how it behaves on ordinary prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths import rng
from ..modes.prompts import written_lines
from .base import Preparation

GENERIC = (
    "", "a photo", "a painting", "a portrait of a person", "an animal", "a landscape", "a building", "a plate",
    "a black and white drawing", "a street at night", "a car",
)  # fmt: skip
"""Ordinary prompts for who gives none."""


@dataclass(frozen=True)
class State:
    """One state of one picture: x_t (1, C, H, W), its timestep (1,), the prompt, SDXL's sizes, the right prediction."""

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


def moments(length: int, steps: int) -> list[int]:
    """The timesteps of a drawing's states, from pure noise on, in a schedule of `length` timesteps."""
    return torch.linspace(length - 1, length / (2 * steps), steps).round().long().tolist()  # type: ignore[no-any-return]


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

    DDIM steps (2010.02502, eq. 12, η = 0) from pure noise, so that every x_t is one the model was trained on. Each
    prompt is drawn alone: memory stays that of one picture. The kit's `rollout` is for the batches of a mode: its own
    prompts, the job's range of timesteps, draws that belong to the samples, and all states at once.
    """
    first = at.batch(0)
    if first is None:
        return
    schedule = at.kit.schedule
    times = moments(len(schedule), steps)
    ids = None if first.time_ids is None else first.time_ids[:1]
    for index, prompt in enumerate(prompts):
        with at.kit.strength(0.0):
            conditioning = at.kit.text((prompt,))
        x = rng.normal(first.mean.shape[1:], purpose, at.seed, 0, (index,)).to(first.mean.device)
        for place, step in enumerate(times):
            t = torch.full((1,), step, dtype=torch.int64, device=x.device)
            further, target = place + 1 < len(times), None
            if answered or further:
                with at.kit.teacher():
                    target = at.kit.predict(x, t, conditioning, ids).float()
            if highest is None or step <= highest:
                yield State(x, t, prompt, ids, target if answered else None)
            if further and target is not None:
                x = _towards(schedule, target, x, t, torch.full_like(t, times[place + 1]))


def _towards(schedule: Any, predicted: Tensor, x: Tensor, t: Tensor, then: Tensor) -> Tensor:
    signal, sigma = schedule.signal(t, x)
    if float(signal.min()) == 0 and schedule.prediction == "epsilon":
        return x
    clean = schedule.x0(predicted, x, t)
    return schedule.add_noise(clean, (x - signal * clean) / sigma, then)
