"""TrainTrain's own training rules, for train_traintrain_compatible: what its program does, where ours does otherwise.

Read in its source (commit 7b58929). Its defaults of other settings and its way of making batches are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..params.core import Train
from .addift import Addift, MultiAddift, Rows, stacked
from .base import Batch, Kit, Mode
from .ileco import ILeco

M = TypeVar("M", bound=type[Mode])


def rule_of(kind: type[Mode]) -> Callable[[M], M]:
    """Decorator: the decorated class is what a mode is by TrainTrain's rule."""

    def enter(own: M) -> M:
        kind.by_traintrain = own
        return own

    return enter


@rule_of(Addift)
class TrainTrainAddift(Addift):
    """ADDifT: the directions take turns, the one back also at ratio 0, and at five fixed timesteps.

    v-predictions are compared where ε is meant, the mask is not normalised, and `diff_project` has no effect.
    """

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """‖ε_±κ(x_t, t, c_t) − ε_0(x_t', t, c_o)‖² per pair, in one direction."""
        noise, t = kit.noise(batch), self._scheduled(kit, batch)
        way = self.direction(kit, batch, noise, kit.pair(batch), back=batch.index % 2 == 1)
        rows = stacked(batch, [way], noise, t)
        x = kit.process.add_noise(rows.shown, rows.noise, rows.t)
        wanted = self.teacher(kit, rows, x)
        with kit.strength(rows.strength):
            predicted = kit.predict(x, rows.t, kit.text(rows.targets), rows.time_ids)
        if rows.mask is not None:
            predicted, wanted = predicted * rows.mask, wanted * rows.mask
        return kit.loss(predicted, wanted, rows.t)

    def pure_noise(self, kit: Kit, batch: Batch, noise: Tensor) -> Tensor:
        """The noise that is added, once more."""
        return noise

    def teacher(self, kit: Kit, rows: Rows, x: Tensor) -> Tensor:
        """ε_0(x_t', t, c_o) as it is."""
        with kit.teacher():
            before = kit.process.add_noise(rows.seen, rows.noise, rows.t)
            return kit.predict(before, rows.t, kit.text(rows.originals), rows.time_ids)

    def _scheduled(self, kit: Kit, batch: Batch) -> Tensor:
        """Five fixed timesteps in turn, each for one step forward and one back, (B,)."""
        train = self.settings[Train]
        low, high = train.train_min_timesteps, train.train_max_timesteps
        at = low + (high - low) / 10 * (batch.index // 2 * 2 % 10 + 1)
        time = kit.process.time(min(int(at), 999))
        return torch.full((len(batch.samples),), time, device=batch.mean.device)


@rule_of(MultiAddift)
class TrainTrainMultiAddift(TrainTrainAddift, MultiAddift):
    """The same for many pairs."""


@rule_of(ILeco)
class TrainTrainILeco(ILeco):
    """iLECO without anchors, asked about one and the same noise in every step."""

    def anchors(self) -> tuple[str, ...]:
        """None."""
        return ()

    def noise(self, kit: Kit, batch: Batch) -> Tensor:
        """The same one for the whole run."""
        return kit.noise(batch, fixed=True)
