"""Runs scenarios and remembers every result by its job, so that a broken evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ...adapters.network import Network
from ...engine.catalogue import catalogue
from ...engine.reload import written_network
from ...engine.run import Request, run
from ...engine.run import Result as Ended
from ...errors import DivergedError
from ...events import EventLog
from ...models.load import load_model
from ...params.codec import load
from ...params.job import Job
from ...places import BASE_MODEL, Places
from ..measure import Rate
from .scenario import Scenario, Trained
from .trace import Trace

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Result:
    """What one job of a scenario gave. `figures` are plain numbers; `counts` the hits and trials behind the shares.
    Without any, the loss broke.
    """

    rate: float
    seed: int
    figures: Mapping[str, float]
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A scenario's results: the sweep on the first seed, and the best rate on all seeds."""

    scenario: Scenario
    sweep: tuple[Result, ...]
    best: tuple[Result, ...]

    def mean(self, figure: str) -> float:
        """Mean over the seeds at the best rate."""
        return mean(result.figures.get(figure, math.nan) for result in self.best)

    def reach(self, figure: str) -> tuple[float, float]:
        """Smallest and largest over the seeds at the best rate."""
        values = [result.figures.get(figure, math.nan) for result in self.best]
        return min(values), max(values)

    def interval(self, figure: str) -> tuple[float, float]:
        """The 95 % interval of a share over the pictures of all seeds."""
        hits, trials = (sum(result.counts.get(figure, (0, 0))[n] for result in self.best) for n in (0, 1))
        return Rate(hits, trials).interval

    def line(self) -> dict[str, object]:
        """Plain values for one line of JSON."""
        figures = {name: finite(self.mean(name)) for name in self.best[0].figures}
        goals = {goal.figure: goal.met(self.mean(goal.figure)) for goal in self.scenario.goals}
        return {
            "task": self.scenario.task, "variant": self.scenario.variant, "rate": self.best[0].rate,
            "seeds": [result.seed for result in self.best], "figures": figures,
            "ranges": {name: [finite(end) for end in self.reach(name)] for name in figures},
            "ci95": {name: [round(end, 4) for end in self.interval(name)] for name in self.best[0].counts},
            "goals_met": goals,
        }  # fmt: skip


def finite(value: float) -> float | None:
    """Four digits for JSON; None for what was never reached."""
    return round(value, 4) if math.isfinite(value) else None


class Runner:
    """Trains and measures jobs of the shipped base model below `folder`, one JSON file per result."""

    def __init__(self, folder: Path, log: EventLog) -> None:
        self._folder, self._log = folder, log
        self._model: Any = None
        self._unit = ("", 0.0)
        weights = sorted(BASE_MODEL.glob("*/*.safetensors"))
        self._base = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]

    def summaries(self, scenarios: Sequence[Scenario], quick: bool) -> Iterator[Summary]:
        """Each scenario's results: one job at the shipped settings when `quick`, else the sweep and three seeds."""
        for scenario in scenarios:
            yield self._quick(scenario) if quick else self._whole(scenario)

    def _quick(self, scenario: Scenario) -> Summary:
        (result,) = (self.result(scenario, rate, job) for rate, job in scenario.jobs(SEEDS[0], ()))
        return Summary(scenario, (result,), (result,))

    def _whole(self, scenario: Scenario) -> Summary:
        sweep = [self.result(scenario, rate, job) for rate, job in scenario.jobs(SEEDS[0], scenario.rates)]
        best = _best(scenario, sweep)
        for _ in range(scenario.widen):
            rate = beyond(best.rate, sorted(result.rate for result in sweep))
            if rate is None:
                break
            sweep += [self.result(scenario, rate, job) for rate, job in scenario.jobs(SEEDS[0], (rate,))]
            best = _best(scenario, sweep)
        seeds = SEEDS[1:] if scenario.rates else ()
        others = tuple(
            self.result(scenario, rate, job) for seed in seeds for rate, job in scenario.jobs(seed, (best.rate,))
        )
        return Summary(scenario, tuple(sorted(sweep, key=lambda result: result.rate)), (best, *others))

    def result(self, scenario: Scenario, rate: float, job: dict[str, object]) -> Result:
        """The figures of one job, measured now or remembered from the same job on the same base model; none where the
        loss broke.
        """
        name = self._name(scenario, job)
        path = self._folder / "results" / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Result(rate, kept["seed"], kept["figures"], kept["counts"])
        self._log.note(f"{scenario.task}, {scenario.variant}: rate {rate:g}, seed {job['train_seed']}")
        try:
            figures = self._measured(scenario, {**job, "save_lora_name": name, "save_overwrite": True})
        except DivergedError as error:
            self._log.note(str(error))
            figures = {}
        plain = {key: value.value if isinstance(value, Rate) else float(value) for key, value in figures.items()}
        counts = {key: (value.hits, value.trials) for key, value in figures.items() if isinstance(value, Rate)}
        result = Result(rate, int(str(job["train_seed"])), plain, counts)
        kept = {"task": scenario.task, "variant": scenario.variant, "job": job, "seed": result.seed,
                "figures": plain, "counts": counts}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        partial.replace(path)
        return result

    def picture(self, summary: Summary) -> Path | None:
        """The grid of a scenario's best result on the first seed, drawn unless it is there; None when it has none."""
        scenario, best = summary.scenario, summary.best[0]
        ((_, job),) = scenario.jobs(best.seed, (best.rate,) if best.rate else ())
        name = self._name(scenario, job)
        path = self._folder / "results" / f"{name}.png"
        written = self._places().loras / f"{name}.safetensors"
        if scenario.grid is None or (not path.is_file() and not written.is_file()):
            return None
        if not path.is_file():
            network = written_network(self._job(job), self._base_model(), written, EventLog())
            with network.attached():
                sheet = scenario.grid(Trained(self._base_model(), network, written, path.parent, 0, 0.0))
            sheet.quantize(64).save(path, optimize=True)
        return path

    def _name(self, scenario: Scenario, job: Mapping[str, object]) -> str:
        said = json.dumps([scenario.task, scenario.variant, job, self._base], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _places(self) -> Places:
        return Places.standalone().under(self._folder)

    def _base_model(self) -> Any:
        if self._model is None:
            self._model = load_model(BASE_MODEL)
        return self._model

    @staticmethod
    def _job(raw: Mapping[str, object]) -> Job:
        return load({"format": 1, "model": "demo", **raw}, catalogue()).job

    def _unit_of(self, scenario: Scenario) -> float:
        """CPU seconds per step of the scenario's unit job, found anew when the variant changes."""
        if scenario.unit is not None and self._unit[0] != scenario.variant:
            own = {"save_overwrite": True, "save_lora_name": f"unit-{os.getpid()}"}
            trace, job = Trace(), self._job({**scenario.unit, **own})
            self._run(job, trace)
            self._unit = (scenario.variant, trace.step_seconds)
        return self._unit[1] if scenario.unit is not None else 0.0

    def _run(self, job: Job, trace: Trace) -> Ended:
        return run(Request(job, self._places(), model=self._base_model(), estimates=False), EventLog(trace))

    def _measured(self, scenario: Scenario, raw: dict[str, object]) -> dict[str, float | Rate]:
        job, model, unit, trace = self._job(raw), self._base_model(), self._unit_of(scenario), Trace()
        ended = self._run(job, trace)
        seconds = trace.seconds
        if ended.path is None or ended.folder is None:
            raise KeyboardInterrupt

        def reload(path: Path) -> Network:
            return written_network(job, model, path, EventLog())

        network = reload(ended.path)
        with network.attached():
            seed = int(str(raw["train_seed"]))
            trained = Trained(model, network, ended.path, ended.folder, ended.steps, seconds, seed, trace, unit, reload)
            return {**scenario.measure(trained), "steps": float(ended.steps), "seconds": round(seconds, 2)}


def _best(scenario: Scenario, results: Sequence[Result]) -> Result:
    """The result of the highest value; of equal ones, the one of the highest rate."""
    return max(results, key=lambda result: (scenario.worth(result.figures), result.rate))


def beyond(best: float, rates: Sequence[float]) -> float | None:
    """The next rate outwards when the best is the first or last of the (ascending) rates; None when it is inside."""
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    ratio = rates[-1] / rates[-2] if best == rates[-1] else rates[0] / rates[1]
    return float(f"{best * ratio:.2g}")


def tell(summaries: Iterator[Summary], show: Callable[[Summary], None]) -> list[Summary]:
    """All summaries, each shown as soon as it is there."""
    found = []
    for summary in summaries:
        show(summary)
        found.append(summary)
    return found
