"""Prior preservation without pictures: ordinary prompts keep giving what the untouched model gives.

DreamBooth (2208.12242, eq. 2) adds pictures that the model itself drew of ordinary prompts to the training. Here the
adapted model follows the untouched one's predictions on the way of such drawings, which has no noise of its own:
λ·‖ε_1(x_t, t, c) − ε_0(x_t, t, c)‖².
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths import rng
from ..modes.base import Settings
from ..params.core import Train
from ..params.field import param
from ..params.rules import without_effect
from .base import STAGES, Preparation, Stage
from .trajectories import State, lines, trajectories

STEPS = 8
"""States of one drawing."""


@dataclass(frozen=True)
class PriorParams:
    """What prior preservation adds to the table."""

    prior_loss_weight: float = param(
        0.0,
        "Prior preservation without images: keeps ordinary prompts as the base model has them. Start with 1, 0 is off.",
        "option",
        low=0,
        high=1000,
    )
    prior_prompts: str = param(
        "",
        "Prompts to preserve, one per line: above all those that resemble the concept, without its word. Empty takes a"
        " built-in list.",
        "option",
        holds="lines",
    )
    prior_states: int = param(
        256,
        "Noisy images of these prompts, generated once before the first step; each step uses some at random.",
        "option",
        low=1,
        high=100_000,
    )
    prior_max_timesteps: int = param(
        1000,
        "Preserve only up to this timestep. 500, trained from 450 on, changes the composition and keeps the colours.",
        "option",
        low=100,
        high=1000,
    )
    prior_both_directions: bool = param(
        False,
        "Preserve at strength −1 too, in every second sample: for LoRAs used both ways, as those from pairs.",
        "option",
    )
    prior_batch_size: int = param(
        0, "Preserved prompts per step; 0 takes train_batch_size.", "option", low=0, high=1024
    )


@STAGES.register("prior")
class Prior(Stage):
    """Adds the distance to the untouched model on its own drawings to the loss."""

    help = "Keeps ordinary prompts as the base model has them, without images."
    sections = (PriorParams,)
    rules = (
        without_effect(
            "prior_loss_weight",
            "prior_prompts",
            "prior_states",
            "prior_max_timesteps",
            "prior_both_directions",
            "prior_batch_size",
        ),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._own = settings[PriorParams]
        self._states: list[State] = []
        self._usual = settings[Train].train_batch_size
        self._kit: Any = None
        self._device = torch.device("cpu")
        self._seed = self._step = 0

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        return settings[PriorParams].prior_loss_weight > 0

    @property
    def rows(self) -> int:
        return self._own.prior_batch_size or self._usual

    def prompts(self) -> tuple[str, ...]:
        return lines(self._own.prior_prompts)

    def prepare(self, at: Preparation) -> None:
        self._kit, self._seed, self._device = at.kit, at.seed, at.model.device
        prompts = self.prompts()
        highest = self._own.prior_max_timesteps
        process = at.kit.process
        each = sum(time <= process.time(highest) for time in process.spread_times(STEPS))
        drawings = [prompts[n % len(prompts)] for n in range(-(-self._own.prior_states // each))]
        for state in trajectories(at, drawings, STEPS, "prior", answered=True, highest=highest):
            if at.stopping():
                break
            self._states.append(state.to("cpu"))  # the device has better uses for 32 MB and more
            at.progress("sampling ordinary prompts", len(self._states), len(drawings) * each)
        named = len(set(drawings))
        megabytes = sum(state.nbytes for state in self._states) / 2**20
        at.tell(
            f"{len(self._states)} noisy images of {named} ordinary prompts will be kept as they are; they take"
            f" {megabytes:.0f} MB of main memory."
        )

    def step(self, network: Any, done: int, total: int) -> None:
        self._step = done

    def penalty(self, network: Any) -> Tensor | None:
        if not self._states:
            return None
        chosen = rng.uniform("prior", self._seed, self._step, range(self.rows)) * len(self._states)
        rows = [self._states[int(place)].to(self._device) for place in chosen]
        x, t, target = (torch.cat([getattr(row, name) for row in rows]) for name in ("x", "t", "target"))
        sizes = [row.time_ids for row in rows if row.time_ids is not None]
        ids = torch.cat(sizes) if sizes else None
        with self._strength(len(rows)):
            predicted = self._kit.predict(x, t, self._kit.text([row.prompt for row in rows]), ids)
        weight: float = self._own.prior_loss_weight
        return weight * self._kit.loss(predicted, target, t).mean()

    def _strength(self, rows: int) -> AbstractContextManager[None]:
        """The adapter as it is, or at 1 and −1 in turns: by row where a forward can hold both, else by step."""
        if not self._own.prior_both_directions:
            return nullcontext()
        signs = [1.0 - 2.0 * ((self._step + row) % 2) for row in range(rows)]
        strength = torch.tensor(signs, device=self._device) if self._kit.per_sample else signs[0]
        turn: AbstractContextManager[None] = self._kit.strength(strength)
        return turn
