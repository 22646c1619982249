"""Losses stay on the device in a ring and are read together, so that no step waits for the device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

READ_EVERY = 10
"""Optimizer steps after which the losses are read at the latest, and over which the time per step is averaged."""

SECONDS = 0.9
"""Seconds after which they are read all the same, so that a listener hears of a step at least once a second."""

EMA_DECAY = 0.95


@dataclass(frozen=True)
class Reading:
    """One step as read back: its loss, the average after it, the learning rates it used, whether the scaler skipped it,
    and the scale after it (infinite without one).
    """

    step: int
    loss: float
    ema: float
    rates: tuple[float, ...]
    skipped: bool = False
    scale: float = math.inf


class LossRing:
    """The losses since the last read, and their exponential moving average.

    `plateau` is the average at the last multiple of READ_EVERY: schedulers that watch the loss see this one, so that it
    does not depend on when the losses are read. `clock` gives seconds.
    """

    def __init__(
        self,
        device: torch.device,
        average: float | None = None,
        plateau: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._ring = torch.zeros(READ_EVERY, 3, dtype=torch.float32, device=device)
        self._ring[:, 2] = math.inf
        self._pending: list[tuple[int, tuple[float, ...]]] = []
        self.average, self.plateau = average, plateau
        self._clock, self._since = clock, clock()
        self._told = False
        self._paces: deque[tuple[int, float]] = deque()
        self._per_step = 0.0

    def push(
        self, step: int, loss: Tensor, rates: tuple[float, ...], scaling: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Remember the loss (0-d) of optimizer step `step`; nothing is read. `scaling`: whether the scaler skipped the
        step, and its scale after it (0-d each).
        """
        row = self._ring[len(self._pending)]
        row[0] = loss
        if scaling is not None:
            row[1], row[2] = scaling
        self._pending.append((step, rates))

    def restart_clock(self) -> None:
        """What took place since the last read (loading, encoding, sampling, saving) was no training."""
        self._since = self._clock()

    @property
    def due(self) -> bool:
        """Whether the losses must be read before the next push: the same steps in every process and in every run."""
        return not self._told or (bool(self._pending) and self._pending[-1][0] % READ_EVERY == 0)

    @property
    def overdue(self) -> bool:
        """Whether the pending steps take SECONDS: by the clock, and by the time per step, for a GPU that still works on
        what it was sent.
        """
        return max(self._clock() - self._since, len(self._pending) * self._per_step) >= SECONDS

    def read(self, finite: bool = False) -> tuple[list[Reading], float]:
        """The pending steps in order and the seconds per step of the last READ_EVERY. Reads the device once.

        With `finite` a step whose loss is not finite stays pending, and all after it, until the next read without.
        """
        values = self._ring[: len(self._pending)].cpu().tolist()
        count = len(values)
        if finite:
            count = next((index for index, (loss, *_) in enumerate(values) if not math.isfinite(loss)), count)
        readings = []
        for (step, rates), (loss, skipped, scale) in zip(self._pending[:count], values[:count], strict=True):
            if math.isfinite(loss):
                self.average = loss if self.average is None else EMA_DECAY * self.average + (1 - EMA_DECAY) * loss
            average = math.nan if self.average is None else self.average
            readings.append(Reading(step, loss, average, rates, bool(skipped), scale))
            if step % READ_EVERY == 0:
                self.plateau = self.average
        self._ring[: len(values) - count] = self._ring[count : len(values)].clone()
        del self._pending[:count]
        self._told = True
        if count:
            self._measure(count)
        return readings, self._per_step

    def _measure(self, count: int) -> None:
        """Take in that `count` steps were done since the clock was last read."""
        now = self._clock()
        self._paces.append((count, now - self._since))
        self._since = now
        while sum(steps for steps, _ in self._paces) - self._paces[0][0] >= READ_EVERY:
            self._paces.popleft()
        self._per_step = sum(seconds for _, seconds in self._paces) / sum(steps for steps, _ in self._paces)
