"""Difference: two trainings one after the other, and everything that can happen between them."""

from __future__ import annotations

import dataclasses
import json

import engine_case
import pair_case
import pytest
import torch

from trainer.adapters.file import read_lora
from trainer.data.cache import TensorCache
from trainer.engine import loop
from trainer.engine.build import PassPlan, build
from trainer.engine.control import Control
from trainer.engine.csvlog import read_losses
from trainer.engine.passes import Passes, later_settings, plan_passes
from trainer.engine.preflight import check_before_loading
from trainer.engine.process import Process
from trainer.engine.reload import written_network
from trainer.engine.run import Request, run
from trainer.engine.site import Site
from trainer.errors import JobError, TrainingError
from trainer.events import EventLog, Note, Saved, Step
from trainer.models.load import load_model
from trainer.modes.base import Pass
from trainer.params.core import Network, Save, Train

pytestmark = pytest.mark.usefixtures("no_estimate")

SECOND = {
    "network_rank": 2,
    "network_alpha": 2,
    "train_iterations": 3,
    "train_batch_size": 1,
    "train_learning_rate": 1e-3,
    "train_model_precision": "fp32",
    "save_precision": "fp32",
}
TWO = {"use_2nd_pass_settings": True, "2nd pass": SECOND}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = pair_case.make(tmp_path_factory.mktemp("difference"))
    return DifferenceCase(made.root, made.model, made.pictures)


class DifferenceCase(pair_case.PairCase):
    def settings(self, **changes):
        return super().settings(**{"mode": "Difference", "train_state_every": 2, **changes})


class Watch(engine_case.Trace):
    """Losses of each pass, and what was noted."""

    @property
    def passes(self):
        losses = [(event.step, event.loss) for event in self.events if isinstance(event, Step)]
        starts = [at for at, (step, _) in enumerate(losses) if not at or step <= losses[at - 1][0]]
        return [losses[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]

    @property
    def notes(self):
        return " ".join(event.text for event in self.events if isinstance(event, Note))


def ranks(path):
    tensors, _ = read_lora(path)
    return {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}


def test_both_passes_have_their_own_settings_files_and_logs(case):
    watch = Watch()
    result = case.run(watch, save_lora_name="two", diff_save_1st_pass=True, data_cache="disk", **TWO)
    assert [len(one) for one in watch.passes] == [4, 3]
    saved = [(event.path.rpartition("/")[2], event.final) for event in watch.events if isinstance(event, Saved)]
    assert saved == [("two_copy.safetensors", False), ("two.safetensors", True)]
    assert result.path == case.places.loras / "two.safetensors"
    assert ranks(result.path) == {2} and ranks(case.places.loras / "two_copy.safetensors") == {4}
    for name, losses in zip(("two_copy", "two"), watch.passes, strict=True):
        assert read_losses(result.folder / f"{name}.csv") == losses
    assert result.report["iterations"] == 4 and result.report["second pass"]["iterations"] == 3
    assert result.report["writes"] == "two.safetensors"
    metadata = json.loads(json.dumps(read_lora(result.path)[1]))
    assert metadata["ss_network_dim"] == "2" and metadata["ss_learning_rate"] == "0.001"
    # Put back by the settings it was given, the file is that of the second pass.
    put_back = written_network(case.job(save_lora_name="two", **TWO), load_model(case.model), result.path, EventLog())
    assert {adapter.up.shape[1] for adapter in put_back} == {2}

    # The same picture again: the first pass is taken from the cache, and the second is the same bit for bit.
    again = Watch()
    case.run(again, save_lora_name="again", data_cache="disk", **TWO)
    assert again.passes == watch.passes[1:] and "same image and settings" in again.notes
    # Another target on the same original shares it too, another prompt does not.
    other = Watch()
    changes = {**TWO, "target image": str(case.pictures / "b_t.png")}
    case.run(other, save_lora_name="other", data_cache="disk", **changes)
    assert len(other.passes) == 1 and other.passes != watch.passes[1:]
    prompt = Watch()
    case.run(prompt, save_lora_name="prompt", data_cache="disk", **TWO, **{"original prompt": "a ring"})
    assert len(prompt.passes) == 2

    # The file of the first pass does what the first pass did.
    loaded = Watch()
    copy = str(case.places.loras / "two_copy.safetensors")
    case.run(loaded, save_lora_name="loaded", diff_load_1st_pass=copy, **TWO)
    assert len(loaded.passes) == 1 and "two_copy.safetensors" in loaded.notes
    for (_, one), (_, same) in zip(loaded.passes[0], watch.passes[1], strict=True):
        assert one == pytest.approx(same, rel=1e-5)


def test_the_first_pass_alone_is_there_for_later_runs(case):
    changes = {**TWO, "data_cache": "disk", "train_seed": 11}
    alone, both = Watch(), Watch()
    case.run(alone, save_lora_name="first", **{**changes, "diff_1st_pass_only": True})
    case.run(both, save_lora_name="then", **changes)
    assert [len(one) for one in alone.passes] == [4] and [len(one) for one in both.passes] == [3]
    assert "same image and settings" in both.notes


SAME_COPY = [
    {"save_lora_name": "x", "network_strength": 2, "train_state_every": 1, "sample_steps": 3, "save_as_json": True},
    {"target prompt": "black", "use_2nd_pass_settings": True, "2nd pass": SECOND, "diff_save_1st_pass": True},
]
OTHER_COPY = [
    {"train_learning_rate": 2e-3}, {"network_rank": 8}, {"network_type": "loha"}, {"train_iterations": 5},
    {"train_seed": 4}, {"train_batch_size": 2}, {"original prompt": "a ring"}, {"lora_trigger_word": "sks"},
    {"train_optimizer": "Lion"}, {"train_min_timesteps": 100}, {"network_max_norm": 1}, {"train_clip_skip": 2},
]  # fmt: skip


def test_what_a_cached_first_pass_depends_on(case, tmp_path):
    """Everything that is learned with, the picture, the model and its schedule; not what is done afterwards."""
    model = load_model(case.model)

    def key(picture="a.png", **changes):
        picture = str(case.pictures / picture)
        job = case.job(**{"original image": picture, "target image": str(case.pictures / "b_t.png"), **changes})
        plans = plan_passes(job)
        where = Site(case.places, Process(), EventLog(), tmp_path, TensorCache(None))
        passes = Passes(plans, model, where, check_before_loading(job, case.places), drawn=False)
        try:
            return passes._cache_key(passes.begin(plans[0], resumed=False))
        finally:
            passes.close()

    plain = key()
    assert [key(**changes) for changes in SAME_COPY] == [plain] * len(SAME_COPY)
    found = [key(**changes) for changes in OTHER_COPY] + [key(picture="b.png")]
    weight = model.unet.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 0.1
    found.append(key())
    with torch.no_grad():
        weight[0, 0, 0, 0] -= 0.1
    model.process = dataclasses.replace(model.process, prediction="v_prediction")
    found.append(key())
    assert len({plain, *found}) == 1 + len(found)


def test_without_settings_of_its_own_the_second_pass_has_the_first_ones(case):
    first = case.job(save_lora_name="x", train_seed=8)
    second = later_settings(first, 1)
    assert second[Network] == first[Network] and second[Train] == first.replace(train_seed=9)[Train]
    own = later_settings(case.job(**TWO, network_strength=3, save_lora_name="x"), 1)
    assert (own[Network].network_rank, own[Network].network_strength, own[Save].save_lora_name) == (2, 1, "x")
    assert (own[Train].train_seed, own[Train].train_state_every) == (4, 2)
    assert later_settings(case.job(**{**TWO, "2nd pass": {**SECOND, "train_seed": 77}}), 1)[Train].train_seed == 77


def test_only_the_first_pass(case):
    watch = Watch()
    result = case.run(watch, save_lora_name="only", diff_1st_pass_only=True)
    assert [len(one) for one in watch.passes] == [4] and result.reason == "done"
    assert sorted(path.name for path in case.places.loras.glob("only*")) == ["only_copy.safetensors"]
    assert result.path.name == "only_copy.safetensors"


def site(case, folder="run"):
    return Site(case.places, Process(), EventLog(), case.root / folder, TensorCache(None))


def test_the_second_pass_trains_on_top_of_the_frozen_first(case):
    """Its loss and gradient are those of a plain training on a model into whose weights the first ΔW was merged."""
    job = case.job(**TWO)
    found, plans = check_before_loading(job, case.places), plan_passes(job)
    site(case).folder.mkdir()
    model = load_model(case.model)
    passes = Passes(plans, model, site(case), found, drawn=False)
    first = passes.begin(plans[0], resumed=False)
    with torch.no_grad():
        for flat in first.flat.values:
            flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    passes.settle(plans[0], first, trained=False)
    second = passes.begin(plans[1], resumed=False)
    loss = loop.gradients(second, 0)
    gradients = [gradient.clone() for gradient in second.flat.gradients]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in first.network.parameters())
    deltas = {adapter.module: adapter.delta().detach() for adapter in first.network}
    passes.close()
    assert not any("forward" in vars(module) for module in model.unet.modules())

    with torch.no_grad():
        for module, delta in deltas.items():
            module.weight += delta
    merged = build(PassPlan(plans[1].job, job, 0, Pass("target")), model, site(case), found)
    assert float(loop.gradients(merged, 0)) == pytest.approx(float(loss), rel=1e-4)
    for one, other in zip(merged.flat.gradients, gradients, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm() and other.norm() > 0
    plain = PassPlan(plans[1].job, job, 0, Pass("target"))
    bare = build(plain, load_model(case.model), site(case), found)
    assert abs(float(loop.gradients(bare, 0)) - float(loss)) > 1e-3 * float(loss)


def stop_at(number, step):
    """A control and a listener that stops pass `number` after its step."""
    control, seen = Control(), []

    def listen(event):
        if isinstance(event, Step):
            seen.append(event.step)
            if seen.count(event.step) == number and event.step == step:
                control.stop()

    return control, listen


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_stopped_in_either_pass_goes_on_in_it(case, number):
    changes = {"save_overwrite": True, **TWO}
    whole = Watch()
    case.run(whole, save_lora_name="whole", **changes)
    control, listen = stop_at(number, 2)
    stopped = case.run(listen, control=control, save_lora_name=f"stopped{number}", **changes)
    assert stopped.reason == "stopped" and not list(case.places.loras.glob(f"stopped{number}*"))
    rest = Watch()
    done = case.run(rest, resume=stopped.folder, save_lora_name=f"stopped{number}", **changes)
    assert done.reason == "done" and done.path.is_file()
    assert rest.passes[-1] == whole.passes[1][2 if number == 2 else 0 :]
    assert len(rest.passes) == 3 - number
    assert read_losses(done.folder / f"stopped{number}_copy.csv") == whole.passes[0]
    assert read_losses(done.folder / f"stopped{number}.csv") == whole.passes[1]
    same = [read_lora(path)[0] for path in (done.path, case.places.loras / "whole.safetensors")]
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[1])

    if number == 2:
        (stopped.folder / "pass1.safetensors").unlink()
        with pytest.raises(TrainingError, match="pass1.safetensors"):
            case.run(resume=stopped.folder, save_lora_name="stopped2", **changes)


def test_a_loaded_first_pass_is_not_needed_to_resume_the_second(case):
    copy = case.run(save_lora_name="gone", **{**TWO, "diff_1st_pass_only": True}).path
    changes = {**TWO, "diff_save_1st_pass": False, "diff_load_1st_pass": str(copy)}
    control, listen = stop_at(1, 2)
    stopped = case.run(listen, control=control, save_lora_name="without", **changes)
    copy.unlink()
    rest = Watch()
    assert case.run(rest, resume=stopped.folder, save_lora_name="without", **changes).reason == "done"
    assert [step for step, _ in rest.passes[-1]] == [3]


def test_stop_and_save_in_the_first_pass_writes_the_copy(case):
    control = Control()

    def listen(event):
        if isinstance(event, Step) and event.step == 2:
            control.stop(save=True)

    result = case.run(listen, control=control, save_lora_name="early", **TWO)
    assert result.reason == "saved_early" and result.path.name == "early_copy.safetensors"


def test_what_can_be_refused_is_refused_before_the_first_pass(case, monkeypatch):
    case.run(save_lora_name="there", diff_1st_pass_only=True, train_iterations=1)
    with pytest.raises(JobError, match="there_copy.safetensors exists"):
        case.run(save_lora_name="there", diff_save_1st_pass=True)
    with pytest.raises(JobError, match="diff_load_1st_pass.*no such file"):
        case.run(save_lora_name="bad", diff_load_1st_pass="nowhere.safetensors")
    with pytest.raises(JobError, match="int8"):
        case.run(save_lora_name="bad", use_2nd_pass_settings=True, **{"2nd pass": {"train_model_precision": "int8"}})
    watch = Watch()
    with pytest.raises(Exception, match="betas"):
        settings = {**SECOND, "train_optimizer_settings": "betas=1"}
        case.run(watch, save_lora_name="bad", use_2nd_pass_settings=True, **{"2nd pass": settings})
    assert not watch.losses and not list(case.places.loras.glob("bad*"))


def test_a_dry_run_reports_both_passes(case, monkeypatch):
    monkeypatch.undo()  # with the estimate
    result = case.run(dry=True, save_lora_name="dry", **TWO)
    second = result.report["second pass"]
    assert result.reason == "checked" and 0 < second["trainable parameters"] < result.report["trainable parameters"]
    memory = result.report["estimated memory (MB)"]
    assert memory["training"] > 10 and second.get("estimated memory (MB)", memory)["training"] > 10
    assert not list(case.places.logs.rglob("*-dry"))


@pytest.mark.parametrize(("kind", "prediction"), [("sd2", "v_prediction"), ("sdxl", "epsilon")])
def test_other_families_and_the_model_is_left_as_it_was(tmp_path, kind, prediction):
    made = pair_case.make(tmp_path, kind, prediction)
    case = DifferenceCase(made.root, made.model, made.pictures)
    model = load_model(case.model)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    watch = Watch()
    extra = {"network_train_text_encoder": True, "sample_prompts": "a ring", "sample_every": 2, "sample_steps": 1}
    job = case.job(train_iterations=2, train_gradient_accumulation=2, **extra)
    result = run(Request(job, case.places, model=model), EventLog(watch))
    assert result.path.is_file() and [len(one) for one in watch.passes] == [2, 2]
    assert result.report["prediction"] == prediction
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    modules = [*model.unet.modules(), *(module for encoder in model.text_encoders for module in encoder.modules())]
    assert not any("forward" in vars(module) and hasattr(module, "weight") for module in modules)
    for name in ("samples_copy", "samples"):
        assert [path.name for path in (result.folder / name).iterdir()] == ["000002_0.png"]
