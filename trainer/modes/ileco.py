"""iLECO: what the model predicts for one prompt becomes what it predicts for another. No pictures.

After TrainTrain's iLECO, itself a shortened LECO (Gandikota et al. 2303.07345): the student ε_1(x, t, c_original)
follows the teacher ε_0(x, t, c_target). Unlike TrainTrain's, the noise is fresh in every step and unrelated prompts
are anchored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..params.core import Train
from ..params.field import param
from .base import MODES, Batch, Kit, Mode, Settings

ANCHORS = ("", "a photo", "a painting", "a person", "an animal", "a landscape", "a building", "an object")


@dataclass(frozen=True)
class ILecoParams:
    """What iLECO adds to the table."""

    ileco_anchors: str = param(
        "", "Prompts that must stay as they are, one per line; empty takes a built-in list.", "option", needs="ileco",
        holds="lines",
    )
    ileco_anchor_weight: float = param(
        1.0, "How strongly the anchor prompts are held; 0 lets go.", "option", needs="ileco", low=0, high=100
    )
    ileco_guidance: float = param(
        0.0,
        "How far the target is pushed away from the original; 0 aims at the target itself.",
        "option",
        needs="ileco",
        low=0,
        high=20,
    )


@MODES.register("iLECO")
class ILeco(Mode):
    """Makes one prompt mean another."""

    help = "Makes one prompt mean another, without pictures. An empty target removes what the original prompt names."
    needs = frozenset({"prompts", "size", "te_train", "ileco", "run"})
    sections = (ILecoParams,)
    source = "prompts"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        own = settings[ILecoParams]
        self._compatible = settings[Train].train_traintrain_compatible
        self._weight = 0.0 if self._compatible else own.ileco_anchor_weight
        self._guidance = own.ileco_guidance
        lines = tuple(line.strip() for line in own.ileco_anchors.splitlines() if line.strip())
        self._anchors = ("", *lines) if lines else ANCHORS

    def prompts(self) -> tuple[str, ...]:
        """The anchors, when they have weight."""
        return self._anchors if self._weight else ()

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """‖ε_1(x, t, c_o) − ε_0(x, t, c_t)‖² + w·‖ε_1(x, t, c_a) − ε_0(x, t, c_a)‖² per sample, students in one
        forward.
        """
        x, t = kit.noise(batch, fixed=self._compatible), kit.timesteps(batch)
        anchors = self._anchors_of(batch) if self._weight else ()
        asked = (*batch.prompts, *anchors)
        many = [part.repeat(len(asked) // len(batch.prompts), *[1] * (part.dim() - 1)) for part in (x, t)]
        ids = None if batch.time_ids is None else batch.time_ids.repeat(len(asked) // len(batch.prompts), 1)
        target = self._teacher(kit, many, (*batch.targets, *anchors), batch, ids)
        losses = kit.loss(kit.predict(many[0], many[1], kit.text(asked), ids), target, many[1])
        mapped, held = losses[: len(batch.prompts)], losses[len(batch.prompts) :]
        return mapped + self._weight * held if self._weight else mapped

    def _teacher(self, kit: Kit, many: list[Tensor], prompts: tuple[str, ...], batch: Batch, ids: Any) -> Tensor:
        with kit.teacher():
            target = kit.predict(many[0], many[1], kit.text(prompts), ids)
            if self._guidance:
                count = len(batch.prompts)
                own_ids = None if ids is None else ids[:count]
                original = kit.predict(many[0][:count], many[1][:count], kit.text(batch.prompts), own_ids)
                pushed = target[:count] + self._guidance * (target[:count] - original)
                target = torch.cat([pushed, target[count:]])
        return target

    def _anchors_of(self, batch: Batch) -> tuple[str, ...]:
        """One anchor for each sample, all of them in turn over the run."""
        start = batch.index * batch.share
        return tuple(self._anchors[(start + sample) % len(self._anchors)] for sample in batch.samples)
