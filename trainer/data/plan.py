"""Which items make up which batch: a pure function of the seed and the batch number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..errors import DataError

Batch = tuple[int, ...]


def filled(pool: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """A pool that is smaller than a batch, as many times over as whole batches need; a larger one as it is.

    Its items then count more often in an epoch than those of other pools.
    """
    rounds = math.lcm(len(pool), batch_size) // len(pool) if 0 < len(pool) < batch_size else 1
    return tuple(pool) * rounds


class Plan:
    """The batches of a run. Each epoch holds every index of every pool once, each batch indices of one pool only.

    A pool lists the items of one bucket, an item as often as it counts. The last batch of a pool may be short;
    nothing is dropped or repeated to fill it. Epochs are shuffled independently, so any batch can be asked for first.
    """

    def __init__(self, pools: Sequence[Sequence[int]], seed: int, batch_size: int) -> None:
        """Raises DataError when there is nothing to draw from or `batch_size` (pictures) is below 1."""
        if batch_size < 1:
            raise DataError(f"train_batch_size = {batch_size}: must be 1 or more.")
        self._pools = tuple(tuple(pool) for pool in pools if pool)
        if not self._pools:
            raise DataError("There are no images to make batches from.")
        self._seed = seed
        self._batch_size = batch_size
        self._epoch: tuple[int, tuple[Batch, ...]] = (-1, ())
        self.batches_per_epoch: int = sum(-(-len(pool) // batch_size) for pool in self._pools)
        self.samples_per_epoch: int = sum(len(pool) for pool in self._pools)

    def batch(self, number: int) -> Batch:
        """The item indices of batch `number`, counted from 0 through all epochs. Raises ValueError below 0."""
        if number < 0:
            raise ValueError(f"batch {number}: batches are counted from 0")
        epoch, position = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> tuple[Batch, ...]:
        """All batches of one epoch in order; epochs are counted from 0."""
        known, batches = self._epoch  # one read and one write of one attribute: threads may share a plan
        if known != epoch:
            batches = self._shuffled(epoch)
            self._epoch = (epoch, batches)
        return batches

    def _shuffled(self, epoch: int) -> tuple[Batch, ...]:
        draw = random.Random(f"batches/{self._seed}/{epoch}")
        batches: list[Batch] = []
        for pool in self._pools:
            order = list(pool)
            draw.shuffle(order)
            batches += [tuple(order[at : at + self._batch_size]) for at in range(0, len(order), self._batch_size)]
        draw.shuffle(batches)
        return tuple(batches)
