"""Several processes, one thread each, share the scenarios of a suite; what each finds lies in the folder of results."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ...events import EventLog
from .runner import Runner, Summary
from .scenario import Scenario, Suite


def suite_of(name: str) -> Suite:
    """The suite of this name: modes, adapters."""
    return importlib.import_module(f".{name}", __package__).SUITE  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Chosen:
    """Scenarios of a suite by their places in it, and the folder that its pictures and results lie in."""

    suite: str
    folder: Path
    places: tuple[int, ...]

    def scenarios(self) -> tuple[Scenario, ...]:
        """The chosen ones in their order."""
        every = suite_of(self.suite).scenarios(self.folder)
        return tuple(every[place] for place in self.places)


def summaries(chosen: Chosen, runner: Runner, quick: bool, workers: int) -> Iterator[Summary]:
    """The summaries in their order, each as soon as it is there, worked out by `workers` processes."""
    scenarios = chosen.scenarios()
    if workers == 1 or len(scenarios) == 1:
        yield from runner.summaries(scenarios, quick)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (chosen,)) as pool:
        filled = [pool.submit(_fill, number, quick) for number in range(len(scenarios))]
        try:
            for scenario, done in zip(scenarios, filled, strict=True):
                done.result()
                yield from runner.summaries([scenario], quick)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # broken off, nothing new is begun


_WORKER: list[tuple[Sequence[Scenario], Runner]] = []
"""What a worker process keeps from one scenario to the next: the model and what it draws untouched."""


def _begin(chosen: Chosen) -> None:
    torch.set_num_threads(1)
    _WORKER.append((chosen.scenarios(), Runner(chosen.folder, EventLog())))


def _fill(number: int, quick: bool) -> None:
    scenarios, runner = _WORKER[0]
    for _ in runner.summaries([scenarios[number]], quick):
        pass
