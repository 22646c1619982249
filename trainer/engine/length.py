"""How long a run is: optimizer steps, the micro batches they add up, and the epochs those make."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """`steps` optimizer steps of `accumulation` micro batches each; `batches` micro batches in all.

    Micro batches run on over the ends of epochs. `per_epoch` of them are one epoch, in which every sample is seen once;
    0 where there are no epochs. Only the last step may have fewer than `accumulation`: a run that is counted in epochs
    ends exactly where its last epoch does.
    """

    steps: int
    accumulation: int = 1
    batches: int = 0
    per_epoch: int = 0

    @classmethod
    def of_steps(cls, steps: int, accumulation: int, per_epoch: int) -> Length:
        """A run of so many optimizer steps."""
        return cls(steps, accumulation, steps * accumulation, per_epoch)

    @classmethod
    def of_epochs(cls, epochs: int, accumulation: int, per_epoch: int) -> Length:
        """A run of so many epochs of `per_epoch` > 0 micro batches each."""
        batches = epochs * per_epoch
        return cls(math.ceil(batches / accumulation), accumulation, batches, per_epoch)

    def micro_batches(self, step: int) -> range:
        """The numbers of the micro batches of optimizer step `step`, both counted from 0."""
        return range(self.seen(step), self.seen(step + 1))

    def seen(self, step: int) -> int:
        """Micro batches seen after `step` optimizer steps."""
        return min(step * self.accumulation, self.batches)

    def begun(self, step: int) -> int:
        """Epochs begun after `step` optimizer steps: n while the n-th is under way and at its end; 0 without epochs."""
        return math.ceil(self.seen(step) / self.per_epoch) if self.per_epoch else 0

    def end_of(self, epoch: int) -> int:
        """The optimizer step after which `epoch` epochs have been seen whole."""
        return math.ceil(epoch * self.per_epoch / self.accumulation)

    @property
    def epochs(self) -> float:
        """Epochs in all, also parts of one; 0 where there are none."""
        return self.batches / self.per_epoch if self.per_epoch else 0.0

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch: no whole number where a step reaches over the end of an epoch."""
        return self.per_epoch / self.accumulation
