"""iLECO: what the model predicts for one prompt becomes what it predicts for another. No pictures.

After TrainTrain's iLECO, itself a shortened LECO (Gandikota et al. 2303.07345): the student ε_1(x, t, c_original)
follows the teacher ε_0(x, t, c_target). Unlike TrainTrain's, the noise is fresh in every step, and every second row is
an anchor: an unrelated prompt that must stay as it is, a pair whose target is its original.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainingError
from ..params.core import Train
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.network import NetworkOptions
from ..params.rules import Rule
from .base import MODES, Batch, Kit, Mode, Preparation, Settings
from .prompts import RULES, of_the_seed, prompt_pairs, unrelated, written_lines

ANCHORS = ("", "a photo", "a painting", "a person", "an animal", "a landscape", "a building", "an object")
ROLLOUTS = (8, 13, 10, 17, 9, 15, 11, 20)
"""Sampling steps of one rollout after the other: different ones meet different timesteps."""


@dataclass(frozen=True)
class ILecoParams:
    """What iLECO adds to the table."""

    ileco_anchors: str = param(
        "",
        "Prompts that must not change, one per line. Empty takes a built-in list.",
        "option",
        needs="ileco",
        holds="lines",
    )
    ileco_anchor_weight: float = param(
        1.0,
        "Loss weight of the anchor prompts; 0 trains only the pairs.",
        "option",
        needs="ileco",
        low=0,
        high=100,
    )
    ileco_guidance: float = param(
        0.0,
        "How far the target is pushed away from the original; 0 is the target itself, 1 helps to remove.",
        "option",
        needs="ileco",
        low=0,
        high=20,
    )
    ileco_bank: int = param(
        0, "Noisy images precomputed with their targets; with 256 a step takes two thirds of the time. 0 uses fresh"
        " noise in each step.", "option", needs="ileco", low=0, high=100_000,
    )  # fmt: skip


def own_anchors(settings: Settings) -> tuple[str, ...]:
    """The lines of ileco_anchors."""
    return written_lines(settings[ILecoParams].ileco_anchors)


def held_and_changed(job: Job, mode: ModeInfo) -> str:
    """An anchor that is an original prompt."""
    both = sorted(set(own_anchors(job)) & set(prompt_pairs(job)[0])) if "ileco" in mode.needs else []
    return f"holds {both[0]!r}, which is an original prompt; it cannot both change and stay." if both else ""


def anchors_let_go(job: Job, mode: ModeInfo) -> str:
    """Anchors without weight, which nothing else uses either."""
    own = job[ILecoParams]
    if not own_anchors(job) or own.ileco_anchor_weight or job[NetworkOptions].network_init == "instant":
        return ""
    return "has no effect while ileco_anchor_weight is 0."


def weight_without_anchors(job: Job, mode: ModeInfo) -> str:
    """A weight of anchors, by TrainTrain's rules, which have none."""
    if not job[Train].train_traintrain_compatible or job[ILecoParams].ileco_anchor_weight in (0, 1):
        return ""
    return "has no effect with train_traintrain_compatible, which trains without anchors."


@MODES.register("iLECO")
class ILeco(Mode):
    """Makes one prompt mean another."""

    help = "Makes one prompt mean another, without images. An empty target removes what the original prompt names."
    needs = frozenset({"prompts", "size", "te_train", "ileco", "instant", "run"})
    sections = (ILecoParams,)
    rules = (
        *RULES,
        of_the_seed("ileco_anchors", "anchors"),
        of_the_seed("ileco_bank", "a bank"),
        Rule(("ileco_anchors", "original_prompt", "mode"), held_and_changed, complete=True),
        Rule(("ileco_anchors", "ileco_anchor_weight", "network_init"), anchors_let_go, warning=True),
        Rule(("ileco_anchor_weight", "train_traintrain_compatible"), weight_without_anchors, warning=True),
    )
    source = "prompts"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._own = settings[ILecoParams]
        self._bank: Bank | None = None

    def anchors(self) -> tuple[str, ...]:
        """The prompts that must stay; none without weight."""
        if not self._own.ileco_anchor_weight:
            return ()
        originals = prompt_pairs(self.settings)[0]
        if "" in originals:  # everything is to change: whatever is held stands against it
            return own_anchors(self.settings)
        return ("", *(own_anchors(self.settings) or unrelated(ANCHORS[1:], originals)))

    def prepare(self, at: Preparation) -> None:
        """Fills the bank, when one is asked for."""
        if not self._own.ileco_bank:
            return
        began = time.perf_counter()
        self._bank = fill_bank(at, self._own.ileco_bank, self._own.ileco_guidance)
        at.tell(
            f"Bank: {len(self._bank) * self._bank.share} noisy images in {len(self._bank)} states, "
            f"made in {time.perf_counter() - began:.1f} s."
        )

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """‖ε_1(x, t, c_o) − ε_0(x, t, c_t)‖² per sample; for an anchor c_t = c_o, and its weight counts."""
        if self._bank is None:
            x, t = self.noise(kit, batch), kit.timesteps(batch)
            with kit.teacher():
                target = kit.predict(x, t, kit.text(batch.targets), batch.time_ids)
            target = pushed(kit, batch, (x, t), target, None, self._own.ileco_guidance)
        else:
            batch, x, t, target = self._bank.rows(batch)
        losses = kit.loss(kit.predict(x, t, kit.text(batch.prompts), batch.time_ids), target, t)
        return losses * self._weights(batch).to(losses)

    def noise(self, kit: Kit, batch: Batch) -> Tensor:
        """What the model is asked about where there is no bank: fresh in every step."""
        return kit.noise(batch)

    def _weights(self, batch: Batch) -> Tensor:
        held = self._own.ileco_anchor_weight
        return torch.tensor([held if own == to else 1.0 for own, to in zip(batch.prompts, batch.targets, strict=True)])


def changed_rows(batch: Batch) -> list[int]:
    """The rows that are no anchors."""
    return [row for row, pair in enumerate(zip(batch.prompts, batch.targets, strict=True)) if pair[0] != pair[1]]


def pushed(
    kit: Kit, batch: Batch, state: tuple[Tensor, Tensor], target: Tensor, original: Tensor | None, guidance: float
) -> Tensor:
    """ε_0(c_t) + g·(ε_0(c_t) − ε_0(c_o)) at the state (x, t); `original` is ε_0(c_o) where it is known already."""
    rows = changed_rows(batch)
    if not guidance or not rows:
        return target
    if original is None:
        x, t = state
        ids = None if batch.time_ids is None else batch.time_ids[rows]
        with kit.teacher():
            own = kit.predict(x[rows], t[rows], kit.text([batch.prompts[row] for row in rows]), ids)
    else:
        own = original[rows]
    moved = target.clone()
    moved[rows] = target[rows] + guidance * (target[rows] - own)
    return moved


@dataclass(frozen=True)
class State:
    """One step of a rollout: the prompts of a batch, x_t and what to predict there (B, C, H, W), t (B,)."""

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    x: Tensor
    t: Tensor
    wanted: Tensor


class Bank:
    """States of the untouched model's own sampling with the teacher's answers, in memory, each used in turn."""

    def __init__(self, states: Sequence[State], share: int) -> None:
        self._states, self.share = tuple(states), share
        stride = max(1, round(len(states) * 0.618))  # golden section: consecutive steps see states far apart
        while math.gcd(stride, len(states)) != 1:
            stride += 1
        self._stride = stride

    def __len__(self) -> int:
        return len(self._states)

    def rows(self, batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor]:
        """(the batch with its prompts replaced, x, t, target): sample s of batch i from state (i·stride + 7·s) mod n.

        A sample stays in its column, so that several processes use what each of them made.
        """
        device = batch.mean.device
        picked = [
            (self._states[(batch.index * self._stride + 7 * sample) % len(self)], column)
            for column, sample in enumerate(batch.samples)
        ]
        x, t, wanted = (
            torch.stack([getattr(state, name)[column] for state, column in picked]).to(device, non_blocking=True)
            for name in ("x", "t", "wanted")
        )
        prompts = tuple(state.prompts[column] for state, column in picked)
        targets = tuple(state.targets[column] for state, column in picked)
        return dataclasses.replace(batch, prompts=prompts, targets=targets), x, t, wanted


def fill_bank(at: Preparation, size: int, guidance: float) -> Bank:
    """At least `size` states, counted over all processes: short samplings of the original and anchor prompts.

    Fewer when the user ends the run meanwhile. Raises TrainingError when no state is in the range of timesteps.
    """
    states: list[State] = []
    share, index = 1, 0
    while len(states) * share < size and not (states and at.stopping()):
        given = at.batch(index)
        if given is None:
            raise ValueError("every process needs a sample of its own in each batch of prompts")
        share = given.share
        for x, t, own in at.kit.rollout(given, ROLLOUTS[index % len(ROLLOUTS)]):
            states.append(_answered(at.kit, given, x, t, own, guidance))
        index += 1
        if index == len(ROLLOUTS) and not states:
            raise TrainingError(
                "ileco_bank: no sampling step lies between train_min_timesteps and train_max_timesteps. Widen the "
                "range, or set ileco_bank to 0."
            )
    return Bank(states, share)


def _answered(kit: Kit, batch: Batch, x: Tensor, t: Tensor, own: Tensor, guidance: float) -> State:
    """A state with the teacher's answer: `own`, its prediction for the row's own prompt, is the answer of an anchor."""
    rows = changed_rows(batch)
    wanted = own.clone()
    if rows:
        ids = None if batch.time_ids is None else batch.time_ids[rows]
        with kit.teacher():
            wanted[rows] = kit.predict(x[rows], t[rows], kit.text([batch.targets[row] for row in rows]), ids)
    wanted = pushed(kit, batch, (x, t), wanted, own, guidance)
    return State(batch.prompts, batch.targets, x.cpu(), t.cpu(), wanted.cpu())
