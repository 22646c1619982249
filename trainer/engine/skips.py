"""Optimizer steps that were skipped because the scaled gradients overflowed float16: counted, reported, and limited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .losses import READ_EVERY, Reading

MOST_IN_A_ROW = 20
LEAST_SCALE = 1.0


@dataclass
class Skips:
    """What is known of skipped steps: all of them, those in a row up to now, and those the schedule has to wait for.

    Skips are known when the losses are read. The schedule learns of them at multiples of READ_EVERY steps alone
    (until then they are `unsettled`), so that an extra read, for a save or a stop, never changes the run; from there it
    stands still for as many steps (`owed`).
    """

    total: int = 0
    row: int = 0
    unsettled: int = 0
    owed: int = 0

    def take(self, reading: Reading) -> bool:
        """Count a step that was read back; returns whether anything is still learned."""
        self.row = self.row + 1 if reading.skipped else 0
        self.total += reading.skipped
        self.unsettled += reading.skipped
        if reading.step % READ_EVERY == 0:
            self.owed, self.unsettled = self.owed + self.unsettled, 0
        return self.row <= MOST_IN_A_ROW and reading.scale >= LEAST_SCALE

    def hold(self) -> bool:
        """Whether the schedule stands still in this step."""
        if not self.owed:
            return False
        self.owed -= 1
        return True

    def state_dict(self) -> dict[str, int]:
        """What a resumed run continues from."""
        return {"total": self.total, "row": self.row, "unsettled": self.unsettled, "owed": self.owed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state; an empty one is that of a run without skips."""
        self.total, self.row = state.get("total", 0), state.get("row", 0)
        self.unsettled, self.owed = state.get("unsettled", 0), state.get("owed", 0)
