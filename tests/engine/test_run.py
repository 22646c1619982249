"""A job from its settings to a file: what is told, written, refused and left alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import engine_case
import pytest
import torch
from safetensors import safe_open

from trainer.engine import loop
from trainer.engine.control import Control
from trainer.errors import AdapterError, AtelierError, DataError, JobError, TrainingError
from trainer.events import Finished, Note, Preflight, Saved, Step
from trainer.models.load import load_model
from trainer.modes.base import MODES
from trainer.stages.base import STAGES

pytestmark = pytest.mark.usefixtures("no_estimate")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("case"))


def test_a_job_becomes_a_file_a_log_and_events(case, monkeypatch):
    monkeypatch.undo()  # with the estimate
    trace = engine_case.Trace()
    result = case.run(trace, save_lora_name="whole", save_as_json=True, save_per_steps=5)
    assert result.reason == "done" and result.path.is_file()
    assert sorted(trace.losses) == list(range(1, 13))
    assert engine_case.csv_losses(result.folder) == trace.losses
    saved = [Path(event.path).name for event in trace.events if isinstance(event, Saved)]
    assert saved == ["whole_5steps.safetensors", "whole_10steps.safetensors", "whole.safetensors"]
    (settings,) = (case.places.json).rglob("*.json")
    assert json.loads(settings.read_text())["train_seed"] == 3
    report = next(event.report for event in trace.events if isinstance(event, Preflight))
    assert report["modules"] == {"unet": report["modules"]["unet"], "te1": 12}
    assert list(report["estimated memory (MB)"]) == ["encoding images", "training"]  # text encoders are trained
    assert all(size > 1 for size in report["estimated memory (MB)"].values())
    with open(result.folder / "whole.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["network_rank", "4"] and rows[8] == ["Step", "Loss", "Learning Rate 1", "Learning Rate 2"]


def test_the_same_job_gives_the_same_losses_and_another_seed_others(case):
    def losses(name, **changes):
        trace = engine_case.Trace()
        case.run(trace, save_lora_name=name, **changes)
        return trace.losses

    first = losses("same1")
    assert losses("same2", data_cache="memory") == first
    assert losses("other", train_seed=4) != first


def test_a_lora_to_go_on_from_is_found_by_its_name(case):
    case.run(save_lora_name="first", train_iterations=2)
    for name in ("first", "first.safetensors", str(case.places.loras / "first.safetensors")):
        trace = engine_case.Trace()
        case.run(trace, dry=True, save_lora_name="second", network_resume=name)
        told = [event.text for event in trace.events if isinstance(event, Note)]
        (line,) = (text for text in told if text.startswith("Continuing from first.safetensors"))
        found, of = re.findall(r"\d+", line)
        assert found == of and int(found) > 0


def test_training_lowers_the_loss_of_what_it_sees(case):
    trace = engine_case.Trace()
    case.run(trace, save_lora_name="learns", train_iterations=60, train_learning_rate=5e-3, train_min_timesteps=400)
    losses = list(trace.losses.values())
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


def test_the_model_is_left_as_it_was(case):
    from trainer.engine.run import Request, run
    from trainer.events import EventLog
    from trainer.models.load import load_model

    model = load_model(case.model)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    run(Request(case.job(save_lora_name="left"), case.places, model=model), EventLog())
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert not any("forward" in vars(module) for module in model.unet.modules())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "nowhere.safetensors"}, JobError, "model"),
        ({"lora_data_directory": "nowhere"}, (DataError, JobError), "nowhere"),
        ({"train_model_precision": "int8"}, JobError, "int8"),
        ({"network_resume": "missing.safetensors"}, JobError, "network_resume"),
        ({"network_blocks(BASE = TextEncoder)": ["IN00"]}, AdapterError, "network_blocks"),
        ({"train_optimizer": "AdamW8bit"}, AtelierError, "AdamW8bit"),
        ({"train_optimizer_settings": "betas=__import__('os')"}, AtelierError, "literal"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(case, changes, error, words):
    with pytest.raises(error, match=words):
        case.run(save_lora_name="refused", **changes)
    assert not list(case.places.loras.glob("refused*"))
    assert not list(case.places.logs.rglob("*refused*"))


def test_an_existing_file_is_not_overwritten_unless_asked(case):
    case.run(save_lora_name="twice", train_iterations=1)
    with pytest.raises(JobError, match="save_overwrite"):
        case.run(save_lora_name="twice", train_iterations=1)
    assert case.run(save_lora_name="twice", train_iterations=1, save_overwrite=True).reason == "done"


def test_dry_run_reports_and_writes_nothing(case):
    trace = engine_case.Trace()
    result = case.run(trace, dry=True, save_lora_name="dry")
    assert result.reason == "checked" and result.report["trainable parameters"] > 0
    assert not list(case.places.loras.glob("dry*")) and not list(case.places.logs.rglob("*-dry"))


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"prior_loss_weight": 1, "prior_states": 1200}, ["Keeps ordinary prompts"]),
        ({"abm_enabled": True}, ["keeps the signs of the gates"]),
        ({"network_init": "pissa", "lalora_lambda": 0.5}, ["Starts the adapter from", "Limits changes of the weights"]),
        ({"lalora_lambda": 1.0}, ["Limits changes of the weights"]),
        ({"mode": "iLECO", "ileco_bank": 24, "original prompt": "red"}, ["Makes the 24 states of ileco_bank."]),
        ({"mode": "Instant", "original prompt": "red", "target prompt": "blue"}, ["Solves for every layer"]),
        ({}, []),
    ],
)
def test_a_dry_run_says_what_comes_before_the_first_step_and_does_none_of_it(case, monkeypatch, changes, first):
    def prepared(self, at):
        raise RuntimeError("a dry run prepares nothing")

    for kind in [*(kind for _, kind in STAGES.items()), *(kind for _, kind in MODES.items())]:
        monkeypatch.setattr(kind, "prepare", prepared)
    report = case.run(dry=True, save_lora_name="dry", **changes).report
    lines = report.get("before the first step", [])
    assert len(lines) == len(first) and all(word in " ".join(lines) for word in first)


def test_stop_discards_and_stop_and_save_writes(case):
    control = Control()

    def stop_at_10(event):
        if isinstance(event, Step) and event.step == 10:
            control.stop()

    result = case.run(stop_at_10, control=control, save_lora_name="stopped", train_iterations=30)
    assert result.reason == "stopped" and result.path is None
    assert not list(case.places.loras.glob("stopped*"))

    control = Control()

    def save_at_10(event):
        if isinstance(event, Step) and event.step == 10:
            control.stop(save=True)

    result = case.run(save_at_10, control=control, save_lora_name="kept", train_iterations=30)
    assert result.reason == "saved_early" and result.path.is_file()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_loss_is_discarded_and_ends_the_run(case, monkeypatch, poison):
    trace, seen = engine_case.Trace(), {}
    original = loop.gradients

    def poisoned(session, step):
        loss = original(session, step)
        if step == 6:
            seen["before"] = [flat.clone() for flat in session.flat.values]
            seen["session"] = session
            session.flat.gradients[0][3] = poison
        if step == 7:
            seen["after"] = [flat.clone() for flat in session.flat.values]
        return loss

    monkeypatch.setattr(loop, "gradients", poisoned)
    with pytest.raises(TrainingError, match="train_learning_rate"):
        case.run(trace, save_lora_name=f"broken{poison}", train_iterations=40, save_per_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
    assert seen["session"].step <= 10
    assert isinstance(trace.events[-1], Finished) and trace.events[-1].reason == "failed"
    kept = sorted(path.name for path in case.places.loras.glob(f"broken{poison}*"))
    assert kept == [f"broken{poison}_5steps.safetensors"]
    with safe_open(case.places.loras / kept[0], "pt") as file:
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118


def test_no_step_waits_for_the_device(case):
    """Between two reads no step asks the device for a value (aten::_local_scalar_dense is what .item() becomes)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                Counter.waits += 1
            return func(*args, **(kwargs or {}))

    counts = []
    original = loop.optimizer_step

    def counted(session, plateau):
        Counter.waits = 0
        with Counter():
            loss = original(session, plateau)
        counts.append(Counter.waits)
        return loss

    loop.optimizer_step, kept = counted, original
    try:
        case.run(save_lora_name="waits", train_snr_gamma=5)
    finally:
        loop.optimizer_step = kept
    assert len(counts) == 12 and sum(counts) == 0


def test_precisions_one_after_the_other_in_one_process(case):
    for number, precision in enumerate(("fp32", "bf16", "fp32", "fp16")):
        trace = engine_case.Trace()
        case.run(trace, save_lora_name=f"precision{number}", train_model_precision=precision, train_iterations=4)
        assert len(trace.losses) == 4 and all(math.isfinite(loss) for loss in trace.losses.values())


class Given:
    """A source of these batches and no others."""

    def __init__(self, batches):
        self.batches = batches

    def batch(self, index):
        return self.batches[index]


def cut(batch, part):
    """Some rows of a batch as a batch of their own, which draws what they draw in the whole one."""
    rows = {name: getattr(batch, name)[part] for name in ("prompts", "samples", "mean", "std")}
    return dataclasses.replace(batch, share=len(rows["samples"]), **rows)


@pytest.mark.parametrize("dropout", [{}, {"network_dropout": 0.3, "network_rank_dropout": 0.3}])
def test_accumulated_batches_are_one_large_batch(case, dropout):
    """Two batches of three with the pictures, noise and timesteps of one of six: the same losses and weights."""
    model = load_model(case.model)
    plain = {"train_optimizer": "SGDNesterov", "train_learning_rate": 1.0, "train_max_grad_norm": 0.0, **dropout}
    sessions = []
    for size in (6, 3):
        job = case.job(train_batch_size=size, train_gradient_accumulation=6 // size, train_iterations=3, **plain)
        sessions.append(engine_case.session(case, job, model))
        sessions[-1].network.eject()
    whole, parts = sessions
    large = [whole.source.batch(step) for step in range(3)]
    for step, batch in enumerate(large):  # the epoch of six pictures is one step of either
        small = [parts.source.batch(2 * step + micro).mean for micro in range(2)]
        assert sorted(torch.cat(small).sum((1, 2, 3)).tolist()) == sorted(batch.mean.sum((1, 2, 3)).tolist())
    parts.source = Given([cut(batch, part) for batch in large for part in (slice(3), slice(3, 6))])
    start = torch.cat(whole.flat.values)
    for step in range(3):
        losses = []
        for session in sessions:
            with session.network.attached():
                losses.append(float(loop.optimizer_step(session, None)))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), step
        ours, theirs = (torch.cat(session.flat.values) for session in sessions)
        assert (ours - theirs).norm() < 1e-4 * (ours - start).norm(), step


def test_sample_pictures_are_drawn_at_their_steps(case):
    result = case.run(
        save_lora_name="sampled",
        train_iterations=4,
        sample_prompts="a red circle\na blue square",
        sample_every=2,
        sample_steps=2,
    )
    names = sorted(path.name for path in (result.folder / "samples").iterdir())
    assert names == ["000002_0.png", "000002_1.png", "000004_0.png", "000004_1.png"]


def test_epochs_take_the_place_of_iterations(case):
    result = case.run(save_lora_name="epochs", train_epochs=2, train_iterations=100, train_batch_size=4)
    assert result.report["iterations"] == 4 and result.report["epochs"] == 2
