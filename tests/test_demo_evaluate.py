"""The evaluation: the best rate goes on to more seeds, nothing is run twice, tables say what was measured."""

from __future__ import annotations

import json
import math

import pytest

from trainer.demo.evaluate.adapters import VARIANTS, scenarios
from trainer.demo.evaluate.runner import Result, Runner, Summary
from trainer.demo.evaluate.scenario import Goal, Scenario
from trainer.demo.evaluate.table import insert, markdown, number, sweeps
from trainer.demo.measure import Rate
from trainer.engine.catalogue import catalogue
from trainer.events import EventLog
from trainer.params.codec import load
from trainer.places import BASE_PICTURES


def a_scenario(job=None, **changes):
    facts = {
        "task": "a task", "variant": "a variant", "job": job or {"train_learning_rate": 0.1},
        "measure": lambda trained: {}, "value": lambda figures: figures["good"], "rates": (0.1, 0.2, 0.4),
        "goals": (Goal("good", low=0.5), Goal("bad", high=0.1)),
    }  # fmt: skip
    return Scenario(**{**facts, **changes})


class Counted(Runner):
    """A runner whose figures are worked out from rate and seed; it counts how often it had to."""

    calls = 0

    def _measured(self, scenario, raw):
        self.calls += 1
        rate, seed = raw["train_learning_rate"], raw["train_seed"]
        return {"good": Rate(int(100 * (1 - abs(rate - 0.2))) - seed, 100), "bad": 0.01 * seed}


def test_the_best_rate_of_the_sweep_gets_all_seeds(tmp_path):
    runner = Counted(tmp_path, EventLog())
    (summary,) = runner.summaries([a_scenario()], quick=False)
    assert [result.rate for result in summary.sweep] == [0.1, 0.2, 0.4]
    assert [(result.rate, result.seed) for result in summary.best] == [(0.2, 1), (0.2, 2), (0.2, 3)]
    assert summary.mean("good") == pytest.approx(0.98) and summary.reach("bad") == (0.01, 0.03)
    assert summary.line()["goals_met"] == {"good": True, "bad": True}


def test_nothing_is_measured_twice_and_another_job_is(tmp_path):
    runner = Counted(tmp_path, EventLog())
    first = list(runner.summaries([a_scenario()], quick=False))
    assert runner.calls == 5
    again = Counted(tmp_path, EventLog())
    assert [summary.line() for summary in again.summaries([a_scenario()], quick=False)] == [
        summary.line() for summary in first
    ]
    assert again.calls == 0
    list(again.summaries([a_scenario({"train_learning_rate": 0.1, "network_rank": 2})], quick=True))
    assert again.calls == 1


def test_tables_and_marks(tmp_path):
    scenario = a_scenario()
    results = tuple(Result(0.2, seed, {"good": 0.4 + seed / 100, "bad": math.inf}) for seed in (1, 2, 3))
    summary = Summary(scenario, results[:1], results)
    assert "| a variant | 0.2 | 0.42 (0.41–0.43) ✗ | – ✗ |" in markdown([summary])
    assert "| **0.2** | 0.41 |" in sweeps([summary])
    assert json.loads(json.dumps(summary.line(), allow_nan=False))["figures"]["bad"] is None
    assert number(1234.5) == "1234" and number(0.01234) == "0.0123"

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    insert(page, "results", "new")
    assert page.read_text(encoding="utf-8") == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="no place for sweep"):
        insert(page, "sweep", "new")


def test_a_real_job_is_trained_written_loaded_and_measured(tmp_path):
    job = {**scenarios(tmp_path)[0].job, "train_iterations": 2, "save_per_steps": 0, "train_learning_rate": 0.01}

    def measure(trained):
        assert trained.network.mean_abs_weight()["unet"] > 0 and trained.path.is_file()
        return {"good": float(trained.steps)}

    runner = Runner(tmp_path, EventLog())
    (summary,) = runner.summaries([a_scenario(job, measure=measure, goals=())], quick=True)
    assert summary.best[0].figures["good"] == 2 and summary.best[0].figures["seconds"] > 0


def test_every_adapter_scenario_is_a_job_that_loads(tmp_path):
    found = scenarios(tmp_path)
    assert [scenario.variant for scenario in found] == list(VARIANTS)
    for scenario in found:
        assert len(scenario.rates) == 5 and scenario.rate in scenario.rates
        job = load({**scenario.job, "model": "demo", "lora_data_directory": str(BASE_PICTURES)}, catalogue()).job
        assert not [line for line in job.unknown]
