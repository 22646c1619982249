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
from collections.abc import Sequence
from dataclasses import dataclass

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
class Direction:
    """One direction of a batch: the latents the teacher sees, those the student is shown, the student's strength."""

    seen: Tensor
    shown: Tensor
    strength: float


@dataclass(frozen=True)
class Rows:
    """The directions of a batch below each other, (N, …), for one forward: what both sides see, with their prompts."""

    count: int
    seen: Tensor
    shown: Tensor
    noise: Tensor
    t: Tensor
    strength: float | Tensor
    originals: tuple[str, ...]
    targets: tuple[str, ...]
    time_ids: Tensor | None
    mask: Tensor | None


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
        self._own = settings[AddiftParams]
        self._ratio = settings[Pair].diff_alt_ratio

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """Mean over the directions of ‖ε_±κ(x_t, t, c_t) − ε_0(x_t', t, c_o)‖² per pair, students in one forward.

        Where a forward cannot hold two strengths, the directions take turns, both with the same noise and timestep.
        """
        ways = (False, True) if self._ratio else (False,)
        turns = len(ways) > 1 and not kit.per_sample
        draw = dataclasses.replace(batch, index=batch.index // 2) if turns else batch
        chosen = (ways[batch.index % 2],) if turns else ways
        noise, t, pair = kit.noise(draw), kit.timesteps(draw, STRATA), kit.pair(draw)
        rows = stacked(batch, [self.direction(kit, draw, noise, pair, back) for back in chosen], noise, t)
        x = kit.process.add_noise(rows.shown, rows.noise, rows.t)
        wanted = self.teacher(kit, rows, x)
        with kit.strength(rows.strength):
            predicted = kit.predict(x, rows.t, kit.text(rows.targets), rows.time_ids)
        return kit.loss(predicted, wanted, rows.t, rows.mask).view(rows.count, -1).mean(0)

    def direction(self, kit: Kit, batch: Batch, noise: Tensor, pair: tuple[Tensor, Tensor], back: bool) -> Direction:
        """At strength κ the target picture is to be predicted as the original is; back, at −κ|ρ|, the other way round.
        With ρ < 0 pure noise is to stay as it is instead.
        """
        original, target = pair
        if not back:
            return Direction(original, target, self._own.diff_strength)
        if self._ratio < 0:
            pure = self.pure_noise(kit, batch, noise)
            return Direction(pure, pure, self._own.diff_strength * self._ratio)
        return Direction(target, original, -self._own.diff_strength * self._ratio)

    def pure_noise(self, kit: Kit, batch: Batch, noise: Tensor) -> Tensor:
        """What stands in for the pictures with ρ < 0."""
        return kit.noise(batch, purpose="no change")

    def teacher(self, kit: Kit, rows: Rows, x: Tensor) -> Tensor:
        """ε_0(x_t', t, c_o) as a prediction at x_t. With `diff_project`
        ε_0(x_t, t, c_t) + P(ε_0(x_t', t, c_o) − ε_0(x_t, t, c_t)), P onto z_t − z_o.
        """
        with kit.teacher():
            before = kit.process.add_noise(rows.seen, rows.noise, rows.t)
            wanted = kit.predict(before, rows.t, kit.text(rows.originals), rows.time_ids)
            wanted = kit.process.follow(wanted, rows.shown - rows.seen, rows.t)
            if self._own.diff_project:
                here = kit.predict(x, rows.t, kit.text(rows.targets), rows.time_ids)
                wanted = here + along(wanted - here, rows.shown - rows.seen)
        return wanted


@MODES.register("Multi-ADDifT")
class MultiAddift(Addift):
    """Learns the common difference of many pairs of pictures."""

    help = (
        "Learns the common difference of many image pairs in a folder, each with its own captions; the prompts replace"
        " missing captions."
    )
    needs = frozenset({"prompts", "folder", "pair_name", "trigger", "size", "resume", "pair", "te_train", "run"})
    source = "pairs"


def stacked(batch: Batch, directions: Sequence[Direction], noise: Tensor, t: Tensor) -> Rows:
    """The directions of a batch as the rows of one forward, each with the same noise and timesteps."""
    count = len(directions)
    strength: float | Tensor = directions[0].strength
    if count > 1:
        values = [direction.strength for direction in directions for _ in batch.samples]
        strength = torch.tensor(values, device=batch.mean.device)
    return Rows(
        count,
        torch.cat([direction.seen for direction in directions]),
        torch.cat([direction.shown for direction in directions]),
        noise.repeat(count, 1, 1, 1),
        t.repeat(count),
        strength,
        batch.prompts * count,
        batch.targets * count,
        _repeat(batch.time_ids, count),
        _repeat(batch.mask, count),
    )


def _repeat(rows: Tensor | None, count: int) -> Tensor | None:
    return None if rows is None else rows.repeat(count, *[1] * (rows.dim() - 1))
