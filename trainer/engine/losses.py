"""Losses stay on the device in a ring and are read together, so that no step waits for the device."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

READ_EVERY = 10
EMA_DECAY = 0.95


@dataclass(frozen=True)
class Reading:
    """One step as read back: its loss, the average after it, and the learning rates it used."""

    step: int
    loss: float
    ema: float
    rates: tuple[float, ...]


class LossRing:
    """The losses since the last read, and their exponential moving average.

    `plateau` is the average as it stood at the last multiple of READ_EVERY: schedulers that watch the loss see this
    one, so that an extra read (a save, a stop) never changes the run.
    """

    def __init__(self, device: torch.device, average: float | None = None, plateau: float | None = None) -> None:
        self._ring = torch.zeros(READ_EVERY, dtype=torch.float32, device=device)
        self._pending: list[tuple[int, tuple[float, ...]]] = []
        self.average, self.plateau = average, plateau
        self._since = time.perf_counter()

    def push(self, step: int, loss: Tensor, rates: tuple[float, ...]) -> None:
        """Remember the loss (0-d) of optimizer step `step`; nothing is read."""
        self._ring[len(self._pending)] = loss
        self._pending.append((step, rates))

    @property
    def full(self) -> bool:
        """Whether it must be read before the next push."""
        return len(self._pending) == READ_EVERY

    def read(self) -> tuple[list[Reading], float]:
        """All pending steps in order and the seconds since the last read. Reads the device once."""
        values = self._ring[: len(self._pending)].tolist()
        readings = []
        for (step, rates), loss in zip(self._pending, values, strict=True):
            if math.isfinite(loss):
                self.average = loss if self.average is None else EMA_DECAY * self.average + (1 - EMA_DECAY) * loss
            readings.append(Reading(step, loss, math.nan if self.average is None else self.average, rates))
            if step % READ_EVERY == 0:
                self.plateau = self.average
        self._pending.clear()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return readings, seconds
