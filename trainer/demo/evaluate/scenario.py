"""What is measured: a job, the learning rates it is tried at, how its result is read, and what it should reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ...adapters.network import Network
from ...models.base import Model
from ..measure import Rate
from .trace import Trace

SECOND = "2nd pass"  # where a settings file keeps those of the second pass
Figures = Mapping[str, "float | Rate"]


@dataclass(frozen=True)
class Trained:
    """A finished job: the untouched model with the written file attached, what it cost, and where its run lies.

    `seconds` are those of one core. What is asked may depend on the job's `seed`: then three seeds ask more.
    `trace` is what was seen of the run, `unit` the seconds per step of the scenario's unit job in the same process (0
    without one), `reload` makes the network of another file that the job wrote, not attached.
    """

    model: Model
    network: Network
    path: Path
    folder: Path
    steps: int
    seconds: float
    seed: int = 1
    trace: Trace = field(default_factory=Trace)
    unit: float = 0.0
    reload: Callable[[Path], Network] | None = None


@dataclass(frozen=True)
class Goal:
    """What a figure should reach: at least (`low`) or at most (`high`) a value."""

    figure: str
    low: float | None = None
    high: float | None = None

    def met(self, value: float) -> bool:
        """Whether the value is good enough."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Scenario:
    """One line of the table.

    `task` is what is asked for and `variant` who does it; `job` are plain values as in a settings file, without seed.
    `rates` are the learning rates of the sweep (empty: nothing is learned by steps, one result says all); the job's own
    is what `--quick` runs. With `second` they are those of the job's second pass. While the best is an end of the
    sweep, up to `widen` more are tried beyond it. `measure` reads the result, `value` says how good it is (larger is
    better) and so picks the rate. `grid` draws pictures before and after; the best result's go beside the results, and
    into the documentation when `shown` names a file there. `unit` is a short job run before the variant's first, whose
    step is the measure of time.
    """

    task: str
    variant: str
    job: Mapping[str, object]
    measure: Callable[[Trained], Figures]
    value: Callable[[Mapping[str, float]], float]
    rates: tuple[float, ...] = ()
    goals: tuple[Goal, ...] = ()
    second: bool = False
    grid: Callable[[Trained], Image.Image] | None = None
    shown: str = ""
    widen: int = 0
    unit: Mapping[str, object] | None = None

    @property
    def rate(self) -> float:
        """The shipped learning rate."""
        return float(str(self._learned().get("train_learning_rate", 0.0)))

    def worth(self, figures: Mapping[str, float]) -> float:
        """How good a result is; one without figures, of a run whose loss broke, is worse than any."""
        return self.value(figures) if figures else -math.inf

    def jobs(self, seed: int, rates: tuple[float, ...]) -> Iterator[tuple[float, dict[str, object]]]:
        """Pairs of learning rate and complete job for one seed."""
        for rate in rates or (self.rate,):
            changed = {**self._learned(), "train_learning_rate": rate} if rate else {}
            yield rate, {**self.job, **({SECOND: changed} if self.second else changed), "train_seed": seed}

    def _learned(self) -> Mapping[str, object]:
        """The settings that the rate belongs to."""
        inner = self.job.get(SECOND)
        return inner if self.second and isinstance(inner, Mapping) else self.job


@dataclass(frozen=True)
class Suite:
    """Scenarios that share one page. Below the folder that both are given, `prepare` writes the pictures that the jobs
    of `scenarios` learn from. `details` are figures that the page leaves out; the commands print and keep them.
    """

    name: str
    prepare: Callable[[Path], None]
    scenarios: Callable[[Path], tuple[Scenario, ...]]
    details: frozenset[str] = frozenset()
