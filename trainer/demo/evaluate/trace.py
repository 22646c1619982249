"""What one run costs and says while it goes: CPU seconds of this process at its steps, and its notes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from itertools import pairwise
from statistics import median

from ...events import Event, Note, Preflight, Step


class Trace:
    """A listener of a run's events.

    `at`: optimizer step → CPU seconds since the run began. CPU seconds of one thread are what a free core would take,
    whatever else the machine does meanwhile. `notes`: the lines it told; `report`: what it said it would do.
    """

    def __init__(self) -> None:
        self._began = time.process_time()
        self.at: dict[int, float] = {}
        self.notes: list[str] = []
        self.report: Mapping[str, object] = {}

    @property
    def seconds(self) -> float:
        """CPU seconds since the run began."""
        return time.process_time() - self._began

    def __call__(self, event: Event) -> None:
        now = self.seconds
        if isinstance(event, Preflight):
            self.at[0], self.report = now, event.report
        elif isinstance(event, Step):
            self.at[event.step] = now
        elif isinstance(event, Note):
            self.notes.append(event.text)

    @property
    def step_seconds(self) -> float:
        """CPU seconds of a step, the median over the groups of steps that were told together."""
        return step_seconds(self.at)

    def noted(self, pattern: str) -> tuple[float, ...]:
        """The numbers that the groups of `pattern` find in the first note it fits; none where it fits no note."""
        found = next((match for note in self.notes if (match := re.search(pattern, note))), None)
        return tuple(float(group) for group in found.groups()) if found else ()


def step_seconds(at: Mapping[int, float]) -> float:
    """Median seconds per step from seconds by step; steps that were told at the same moment are one group."""
    ends: list[tuple[int, float]] = []
    for step, seconds in sorted(at.items()):
        if ends and seconds - ends[-1][1] < 1e-3:
            ends[-1] = (step, seconds)
        else:
            ends.append((step, seconds))
    # Steps are told in groups, all at the end of the last one, so that each told group spans the steps since the last.
    spans = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(ends)]
    return median(spans) if spans else 0.0
