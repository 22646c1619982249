"""The evaluation: the best rate goes on to more seeds, nothing is run twice, tables say what was measured."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from trainer.adapters.base import AdapterSpec
from trainer.adapters.network import build_network
from trainer.cli.evaluate import How, evaluate
from trainer.demo.evaluate import workers
from trainer.demo.evaluate.adapters import EVERY, SIGNS, STEPS, VARIANTS, Course, Variant, prepare, scenarios, settings
from trainer.demo.evaluate.forgetting import Drift, Meter, at_success
from trainer.demo.evaluate.runner import Result, Runner, Summary, beyond
from trainer.demo.evaluate.scenario import Goal, Scenario, Trained
from trainer.demo.evaluate.table import insert, markdown, number, sweeps
from trainer.demo.evaluate.trace import Trace, step_seconds
from trainer.demo.evaluate.workers import Chosen
from trainer.demo.measure import Rate
from trainer.engine.build import make_network
from trainer.engine.catalogue import catalogue
from trainer.errors import DivergedError
from trainer.events import EventLog, Note, Preflight
from trainer.models.layers import layers_of
from trainer.models.load import load_model
from trainer.params.codec import load
from trainer.params.names import BLOCKS
from trainer.places import BASE_MODEL, BASE_PICTURES


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
    assert summary.interval("good") == Rate(99 + 98 + 97, 300).interval


def test_a_rate_at_which_the_loss_breaks_is_the_worst_of_the_sweep(tmp_path):
    class Breaking(Counted):
        def _measured(self, scenario, raw):
            if raw["train_learning_rate"] > limit:
                raise DivergedError("The loss became nan at step 3.")
            return super()._measured(scenario, raw)

    notes, limit = [], 0.3
    runner = Breaking(tmp_path, EventLog(lambda event: notes.append(event.text)))
    (summary,) = runner.summaries([a_scenario()], quick=False)
    assert [bool(result.figures) for result in summary.sweep] == [True, True, False]
    assert {result.rate for result in summary.best} == {0.2} and summary.line()["goals_met"]["good"]
    assert " · 0.4: the loss broke |" in sweeps([summary]) and "The loss became nan at step 3." in notes
    again = Counted(tmp_path, EventLog())
    (kept,) = again.summaries([a_scenario()], quick=False)
    assert [result.figures for result in kept.sweep] == [result.figures for result in summary.sweep] and not again.calls
    limit = 0
    (broken,) = Breaking(tmp_path / "all", EventLog()).summaries([a_scenario()], quick=False)
    assert broken.line()["goals_met"] == {"good": False, "bad": False} and "| a variant | 0.4 |" in markdown([broken])


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


def test_workers_fill_the_folder_and_the_summaries_come_in_order(tmp_path, monkeypatch):
    chosen = Chosen("adapters", tmp_path, (2, 0))
    assert [one.variant for one in chosen.scenarios()] == ["null, weights", "lierla (plain LoRA)"]
    # What one worker does, in this process: its result lies in the folder afterwards.
    monkeypatch.setattr(workers, "Runner", Flat)
    monkeypatch.setattr(workers, "_WORKER", [])
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda count: None)
    workers._begin(chosen)
    for place in (1, 0):
        workers._fill(place, quick=True)
        assert len(list((tmp_path / "results").glob("*.json"))) == 2 - place
    # Processes of their own find it there, and so does who asked.
    found = list(workers.summaries(chosen, Unable(tmp_path, EventLog()), quick=True, workers=2))
    assert [summary.scenario.variant for summary in found] == [one.variant for one in chosen.scenarios()]


class Flat(Runner):
    """A runner to whom every job is as good."""

    def _measured(self, scenario, raw):
        return {"asked": Rate(1, 2), "worst fall": 0.0}


class Unable(Runner):
    """A runner that may measure nothing itself."""

    def _measured(self, scenario, raw):
        raise AssertionError("measured in the process that asked")


def test_tables_and_marks(tmp_path):
    scenario = a_scenario()
    results = tuple(Result(0.2, seed, {"good": 0.4 + seed / 100, "bad": math.inf}) for seed in (1, 2, 3))
    summary = Summary(scenario, results[:1], results)
    assert "| a variant | 0.2 | 0.42 (0.41–0.43) ✗ | – ✗ |" in markdown([summary])
    assert "| bad |" not in markdown([summary], {"bad"}) and "0.42 (0.41–0.43) ✗ |" in markdown([summary], {"bad"})
    assert "| variant | learning rate: good / bad |\n|---|---|\n| a variant | **0.2**: 0.41 / – |" in sweeps([summary])
    sometimes = (*results[:2], Result(0.2, 3, {"good": math.inf, "bad": math.inf}))
    assert "| – (0.41 to –) | – ✗ |" in markdown([Summary(scenario, results[:1], sometimes)])
    assert json.loads(json.dumps(summary.line(), allow_nan=False))["figures"]["bad"] is None
    assert number(1234.5) == "1234" and number(0.01234) == "0.0123"

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    insert(page, "results", "new")
    assert page.read_text(encoding="utf-8") == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="no place for sweep"):
        insert(page, "sweep", "new")


def test_a_real_job_is_trained_written_loaded_and_measured(tmp_path):
    prepare(tmp_path)
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
        assert len(scenario.rates) == (5 if VARIANTS[scenario.variant].swept else 1) and scenario.rate in scenario.rates
        job = load({**scenario.job, "model": "demo", "lora_data_directory": str(BASE_PICTURES)}, catalogue()).job
        assert not [line for line in job.unknown]


def test_no_option_of_lokr_is_without_effect_on_these_layers(tmp_path):
    model, told = load_model(BASE_MODEL), []
    own = [scenario.job for scenario in scenarios(tmp_path) if scenario.job["network_type"] == "lokr"]
    assert {"network_tucker", "network_decompose_both"} <= {name for job in own for name in job}
    for raw in own:
        job = load({**raw, "model": "demo", "lora_data_directory": str(BASE_PICTURES)}, catalogue()).job
        make_network(job, model, 0, EventLog(lambda event: told.append(event.text)))
    assert not [line for line in told if "changes nothing" in line]


def test_settings_come_from_the_preset_with_ranks_these_layers_hold():
    found = settings(Variant("LoRA_LoHa", {"use_dora": True}))  # the preset: rank 32, alpha 1, 5e-4
    assert (found["network_type"], found["network_rank"], found["network_alpha"]) == ("loha", 16, 0.5)
    assert found["train_learning_rate"] == 0.025 and found["use_dora"] and "train_iterations" not in found


def test_a_sweep_whose_best_is_at_its_end_goes_on_there(tmp_path):
    """The figures are best at 0.2: upwards of 0.025 … 0.1 two more rates find it."""
    runner = Counted(tmp_path, EventLog())
    (summary,) = runner.summaries([a_scenario(rates=(0.025, 0.05, 0.1), widen=2)], quick=False)
    assert [result.rate for result in summary.sweep] == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert summary.best[0].rate == 0.2
    assert beyond(1.0, (1.0, 2.0, 4.0)) == 0.5 and beyond(4.0, (1.0, 2.0, 4.0)) == 8 and beyond(2.0, (1.0, 2.0)) == 4
    assert beyond(2.0, (1.0, 2.0, 4.0)) is None


def test_seconds_per_step_from_steps_that_are_told_in_groups():
    """Ten steps of 0.1 s, ten of 0.3 s (a file was written in between), five of 0.12 s."""
    told = {0: 5.0, **{step: 6.0 for step in range(1, 11)}, **{step: 9.0 for step in range(11, 21)},
            **{step: 9.6 for step in range(21, 26)}}  # fmt: skip
    assert step_seconds(told) == pytest.approx(0.12)


def test_a_trace_reads_what_was_told():
    trace = Trace()
    trace(Preflight({"trainable parameters": 7}))
    trace(Note("ABM: 91.5% of the signs agreed before, 96.0% after 25 steps."))
    assert trace.report["trainable parameters"] == 7 and 0 in trace.at
    assert trace.noted(SIGNS) == (91.5, 96.0) and trace.noted("nothing (.*)") == ()


def test_a_figure_at_a_success_between_two():
    assert at_success({0.1: 0.0, 0.7: 1.0, 0.9: 2.0}, 0.8) == pytest.approx(1.5)
    assert at_success({0.0: 0.0, 1.0: 3.0}, 0.8) == pytest.approx(2.4)
    assert at_success({0.7: 1.0, 0.8: 2.0}, 0.8) == 2.0


def written(folder, reached):
    """A finished job whose kept files show the word from step `reached` on; what is asked of it is noted."""
    steps = {folder / f"a_{step}steps.safetensors": step for step in range(EVERY, STEPS, EVERY)}

    class Net:
        def attached(self):
            return self.at_strength(1.0)

        @contextmanager
        def at_strength(self, value):
            yield

    asked = []

    def reload(path):
        asked.append(steps[path])
        return Net()

    meter = SimpleNamespace(
        asked_before=lambda _: 0.0,
        asked=lambda _: Rate(9 if asked[-1] >= reached else 2, 10),
        drift=lambda _: Drift(asked[-1] / 10, 1.0),
    )
    return meter, Trained(None, Net(), folder / "a.safetensors", folder, STEPS, 0.0, reload=reload), asked


@pytest.mark.parametrize("reached", range(EVERY, STEPS + 1, EVERY))
def test_the_first_file_that_is_half_right_is_found_by_halving(tmp_path, reached):
    meter, trained, asked = written(tmp_path, reached)
    course = Course(meter, trained, {0: (0.0, 0.0), STEPS: (0.9, 4.0)})
    assert course.steps_to(0.5) == course.steps_to(0.8) == reached and len(asked) == 2


def test_what_the_end_falls_short_of_is_never_reached_and_costs_nothing(tmp_path):
    meter, trained, asked = written(tmp_path, EVERY)
    course = Course(meter, trained, {0: (0.0, 0.0), STEPS: (0.4, 4.0)})
    assert course.steps_to(0.5) == course.drift_at(0.5) == course.seconds_at(math.inf) == math.inf
    assert not asked


def test_drift_is_nothing_at_the_start_and_grows_with_what_was_trained():
    model = load_model(BASE_MODEL)
    layers = [layer for layer in layers_of(model) if layer.part == "unet"]
    spec = AdapterSpec("lierla", rank=4, alpha=4.0)
    network = build_network(layers, spec, BLOCKS, "Full", ("unet",), torch.Generator().manual_seed(0))
    trained, meter = SimpleNamespace(model=model, network=network), Meter(2, 2)
    with network.attached():
        assert meter.drift(trained) == Drift(0.0, 1.0)
        seen = []
        for size in (0.01, 0.02):
            for adapter in network:
                adapter.assign({"up": torch.randn(adapter.up.shape, generator=torch.Generator().manual_seed(1)) * size})
            seen.append(meter.drift(trained))
    assert 0 < seen[0].moved < seen[1].moved and 1 > seen[0].signs > seen[1].signs > 0.5


@pytest.mark.parametrize(
    "how, told",
    [(How(only="no such line"), "'no such line'"), (How(quick=True, write=True), "--quick"),
     (How(only="dora", write=True), "--only")],
)  # fmt: skip
def test_a_part_is_never_written_over_the_whole_table(tmp_path, capsys, how, told):
    assert evaluate("adapters", tmp_path, how) == 2
    assert told in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
