"""ADDifT and Multi-ADDifT: what two pictures differ in, learned directly from the untouched model's predictions.

After TrainTrain's ADDifT (alternating direct difference training). With one noise ε and one timestep t for a pair,
ε_κ(x_t of the target) is trained towards ε_0(x_t of the original): at strength κ the model then shows, where it used
to show the original, the difference on top of it. The opposite direction is trained with strength −κ|ρ|.

The two pictures also change what the untouched model makes of the things they share, and that is learned with the
difference. With `diff_project` (ours) only the part of ε_0(x_t of the original) − ε_0(x_t of the target) that points
along z_t − z_o at its place is added to the untouched model's prediction on the target.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maths.projection import along
from ..params.core import Images, Pair, Train
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .base import MODES, Batch, Kit, Mode, Settings
from .prompts import of_the_seed

STRATA = 10


@dataclass(frozen=True)
class AddiftParams:
    """What ADDifT adds to the table."""

    diff_strength: float = param(
        0.25,
        "Strength of the LoRA during training. The smaller, the more the finished LoRA exaggerates; 1 shows the change"
        " as it was.",
        "option",
        needs="pair",
        low=0.01,
        high=4,
    )
    diff_project: bool = param(
        False,
        "Learn only what points from one image to the other at its place, so that other colours stay. One more forward"
        " per step.",
        "option",
        needs="pair",
    )


def target_name(job: Job, mode: ModeInfo) -> str:
    """Pairs by file name without a name."""
    if "pair_name" not in mode.needs or job[Images].diff_target_name:
        return ""
    return "is empty; write what a target's name has more than its original's, as _b for cat.png and cat_b.png."


def mask_of_the_seed(job: Job, mode: ModeInfo) -> str:
    """A mask, by TrainTrain's rules."""
    if "pair" not in mode.needs or not job[Pair].diff_use_diff_mask or not job[Train].train_traintrain_compatible:
        return ""
    if "pictures" in mode.needs:
        return "has no effect with train_traintrain_compatible: TrainTrain has no mask for a single pair."
    return (
        "is the transparency of the original with train_traintrain_compatible, as in TrainTrain, not where the two"
        " images differ; without transparency it has no effect."
    )


def trigger_of_the_seed(job: Job, mode: ModeInfo) -> str:
    """A trigger word, in a mode of pairs by TrainTrain's rules or in a file of its own."""
    own = job.traintrain or job[Train].train_traintrain_compatible
    if not own or not job[Images].lora_trigger_word.strip() or not mode.needs & {"pictures", "pair_name"}:
        return ""
    if "pair_name" in mode.needs and not job[Train].train_traintrain_compatible:
        return ""
    return f"has no effect in mode {mode.name} by TrainTrain's rules: it is not put in front of the prompts there."


@dataclass(frozen=True)
class _Half:
    """One direction of a batch: what the teacher sees, what the student sees, and the student's strength."""

    teacher: Tensor
    student: Tensor
    strength: float


@MODES.register("ADDifT")
class Addift(Mode):
    """Learns the difference of two pictures."""

    help = (
        "Learns the difference of two images in a few dozen steps, as a slider. An empty target prompt takes the"
        " original one."
    )
    needs = frozenset({"prompts", "pictures", "trigger", "pair", "te_train", "run"})
    sections = (AddiftParams,)
    rules = (
        Rule(("diff_target_name", "mode"), target_name, complete=True),
        of_the_seed("diff_project", "projection", warning=True),
        Rule(("diff_use_diff_mask", "train_traintrain_compatible", "mode"), mask_of_the_seed, warning=True),
        Rule(("lora_trigger_word", "train_traintrain_compatible", "mode"), trigger_of_the_seed, warning=True),
    )
    source = "pair"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        train = settings[Train]
        self._compatible = train.train_traintrain_compatible
        self._range = (train.train_min_timesteps, train.train_max_timesteps)
        self._own = settings[AddiftParams]
        self._project = self._own.diff_project and not self._compatible
        self._ratio = settings[Pair].diff_alt_ratio

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """Mean over the directions of ‖ε_±κ(x_t, t, c_t) − ε_0(x_t', t, c_o)‖² per pair, students in one forward.

        With `diff_project` towards ε_0(x_t, t, c_t) + P(ε_0(x_t', t, c_o) − ε_0(x_t, t, c_t)), P onto z_t − z_o.

        Where a forward cannot hold two strengths, the directions take turns, both with the same noise and timestep.
        """
        turns = self._compatible or (self._ratio != 0 and not kit.per_sample)
        draw = dataclasses.replace(batch, index=batch.index // 2) if turns and not self._compatible else batch
        forward = batch.index % 2 == 0 or not turns
        backward = batch.index % 2 == 1 if turns else self._ratio != 0  # TrainTrain's turn back counts at ratio 0 too
        noise = kit.noise(draw)
        halves = self._halves(kit, draw, noise, forward, backward)
        t = self._scheduled(batch) if self._compatible else kit.timesteps(draw, STRATA)
        return self._compare(kit, batch, halves, noise, t)

    def _halves(self, kit: Kit, batch: Batch, noise: Tensor, forward: bool, backward: bool) -> list[_Half]:
        original, target = kit.pair(batch)
        halves = [_Half(original, target, self._own.diff_strength)] if forward else []
        if backward and self._ratio < 0:
            pure = noise if self._compatible else kit.noise(batch, purpose="no change")
            halves.append(_Half(pure, pure, self._own.diff_strength * self._ratio))
        elif backward:
            halves.append(_Half(target, original, -self._own.diff_strength * self._ratio))
        return halves

    def _compare(self, kit: Kit, batch: Batch, halves: list[_Half], noise: Tensor, t: Tensor) -> Tensor:
        count = len(halves)
        seen, shown = (torch.cat([getattr(half, side) for half in halves]) for side in ("teacher", "student"))
        noise, t = noise.repeat(count, 1, 1, 1), t.repeat(count)
        ids, mask = _repeat(batch.time_ids, count), _repeat(batch.mask, count)
        x = kit.schedule.add_noise(shown, noise, t)
        with kit.teacher():
            before = kit.schedule.add_noise(seen, noise, t)
            wanted = kit.predict(before, t, kit.text(batch.prompts * count), ids)
            if not self._compatible:  # TrainTrain compares v where it means ε
                wanted = kit.schedule.follow(wanted, shown - seen, t)
            if self._project:
                here = kit.predict(x, t, kit.text(batch.targets * count), ids)
                wanted = here + along(wanted - here, shown - seen)
        with kit.strength(self._strengths(halves, batch)):
            predicted = kit.predict(x, t, kit.text(batch.targets * count), ids)
        if self._compatible and mask is not None:  # not normalised
            predicted, wanted, mask = predicted * mask, wanted * mask, None
        return kit.loss(predicted, wanted, t, mask).view(count, -1).mean(0)

    @staticmethod
    def _strengths(halves: list[_Half], batch: Batch) -> float | Tensor:
        if len(halves) == 1:
            return halves[0].strength
        values = [half.strength for half in halves for _ in batch.samples]
        return torch.tensor(values, device=batch.mean.device)

    def _scheduled(self, batch: Batch) -> Tensor:
        """TrainTrain's timesteps: five fixed values in turn, each for one step forward and one back, (B,)."""
        low, high = self._range
        at = low + (high - low) / 10 * (batch.index // 2 * 2 % 10 + 1)
        return torch.full((len(batch.samples),), min(int(at), 999), device=batch.mean.device)


@MODES.register("Multi-ADDifT")
class MultiAddift(Addift):
    """Learns the common difference of many pairs of pictures."""

    help = (
        "Learns the common difference of many image pairs in a folder, each with its own captions; the prompts replace"
        " missing captions."
    )
    needs = frozenset({"prompts", "folder", "pair_name", "trigger", "size", "resume", "pair", "te_train", "run"})
    source = "pairs"


def _repeat(rows: Any, count: int) -> Any:
    return None if rows is None else rows.repeat(count, *[1] * (rows.dim() - 1))
