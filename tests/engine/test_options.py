"""Options of the adapter in whole runs: each changes the training and the file, and resumes bit for bit."""

from __future__ import annotations

import json

import engine_case
import pytest
import tiny
import torch
from safetensors.torch import save_file

from trainer.adapters.file import read_lora
from trainer.engine.catalogue import catalogue
from trainer.engine.control import Control
from trainer.engine.reload import written_network
from trainer.engine.run import Request, run
from trainer.errors import JobError
from trainer.events import EventLog, Note, Step
from trainer.models.layers import unet_layers
from trainer.models.load import load_model
from trainer.params.codec import load

pytestmark = pytest.mark.usefixtures("no_estimate")

SHORT = {
    "train_iterations": 3,
    "network_type": "lierla",
    "network_rank": 2,
    "train_batch_size": 1,
    "save_overwrite": True,
    "network_blocks(BASE = TextEncoder)": ["BASE", "M00"],
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def model(case):
    """Loaded once: every run gives it back as it was."""
    return load_model(case.model)


def carry_out(case, model, name: str, *listeners, control=None, resume=None, **changes):
    job = case.job(**{**SHORT, "save_lora_name": name, **changes})
    return run(Request(job, case.places, model=model, resume=resume), EventLog(*listeners), control)


def short(case, model, name: str, **changes):
    """(losses, tensors of the file, metadata) of a short run."""
    trace = engine_case.Trace()
    result = carry_out(case, model, name, trace, **changes)
    return trace.losses, *read_lora(result.path)


_BEGUN: dict[str, tuple] = {}


@pytest.fixture(scope="module")
def plain(case, model):
    return short(case, model, "plain")


@pytest.mark.parametrize(
    "changes",
    [
        {"network_rslora": True},
        {"network_freeze_down": True},
        {"network_dropout": 0.5},
        {"network_rank_dropout": 0.5},
        {"network_module_dropout": 0.5},
        {"network_max_norm": 1e-4},
        {"loraplus_lr_ratio": 16},
        {"loraplus_te_lr_ratio": 16},
        {"network_block_ranks": "M00=1"},
        {"network_block_alphas": "M00=8"},
        {"network_block_lrs": "M00=8"},
        {"network_name_filter": "*attn*"},
        {"network_init": "pissa"},
        {"network_init": "milora"},
        {"network_init": "olora"},
        {"network_init": "lora_ga"},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_every_option_changes_the_run_and_the_file(case, model, plain, changes) -> None:
    losses, tensors, metadata = short(case, model, "changed", **changes)
    assert losses[1] == pytest.approx(plain[0][1], rel=1e-5), "every start is the bare model"
    assert losses[3] != plain[0][3]
    same = tensors.keys() == plain[1].keys() and all(torch.equal(tensors[key], plain[1][key]) for key in tensors)
    assert not same
    job = json.loads(metadata["atelier_job"])
    assert all(job[key] == value for key, value in changes.items())


EVERYTHING = {
    "network_dropout": 0.2,
    "network_rank_dropout": 0.2,
    "network_module_dropout": 0.1,
    "network_max_norm": 0.05,
    "loraplus_lr_ratio": 4,
    "network_block_lrs": "M00=2",
    "network_rslora": True,
    "network_block_ranks": "M00=3",
}


@pytest.mark.parametrize(
    "changes",
    [EVERYTHING, {"network_init": "lora_ga", "network_freeze_down": True, "network_dropout": 0.3}],
    ids=["together", "lora_ga"],
)
def test_options_resume_bit_for_bit(case, model, changes) -> None:
    changes = {**changes, "train_iterations": 4, "train_state_every": 2}
    whole, parts, control = engine_case.Trace(), engine_case.Trace(), Control()
    one = carry_out(case, model, "whole", whole, **changes)
    stop = lambda event: control.stop() if isinstance(event, Step) and event.step == 2 else None  # noqa: E731
    stopped = carry_out(case, model, "parts", parts, stop, control=control, **changes)
    assert stopped.reason == "stopped"
    two = carry_out(case, model, "parts", parts, resume=stopped.folder, **changes)
    assert parts.losses == whole.losses and sorted(whole.losses) == list(range(1, 5))
    first, second = read_lora(one.path)[0], read_lora(two.path)[0]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_max_norm_holds_in_the_file(case, model) -> None:
    _, tensors, _ = short(case, model, "held", network_max_norm=0.01, train_learning_rate=0.05)
    keys = {name.partition(".")[0] for name in tensors}
    norms = []
    for key in keys:
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        norms.append(float((up.flatten(1) @ down.flatten(1)).norm() * tensors[f"{key}.alpha"] / len(down)))
    assert max(norms) <= 0.01 * 1.001 and sum(norm > 0.0099 for norm in norms) > len(norms) / 2


def test_a_start_reports_itself_and_writes_twice_the_rank(case, model) -> None:
    trace = engine_case.Trace()
    result = carry_out(case, model, "ga", trace, network_init="lora_ga")
    notes = [event.text for event in trace.events if isinstance(event, Note)]
    assert any(note.startswith("network_init lora_ga: ") for note in notes)
    tensors, _ = read_lora(result.path)
    assert {len(tensor) for name, tensor in tensors.items() if "lora_down" in name} == {4}
    assert {float(tensor) for name, tensor in tensors.items() if "alpha" in name} == {4.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"network_init": "pissa"},
        {"network_type": "c3lier", "network_tucker": True},
        {"network_type": "null"},
        {"network_type": "universal", "use_dora": True},
        {"network_timestep_rank": 1},
    ],
    ids=str,
)
def test_a_written_file_is_put_back_whatever_it_was_made_of(case, model, changes) -> None:
    settings = {**SHORT, "save_lora_name": "back", **changes}
    result = carry_out(case, model, "back", **changes)
    network = written_network(case.job(**settings), model, result.path, EventLog())
    tensors, _ = read_lora(result.path)
    assert len(network) == sum(name.endswith(".alpha") for name in tensors) > 5
    for adapter in network:
        down, up = (tensors[f"{adapter.key}.lora_{side}.weight"].flatten(1).float() for side in ("down", "up"))
        wanted = up @ down * tensors[f"{adapter.key}.alpha"] / len(down)
        torch.testing.assert_close(adapter.delta().flatten(1), wanted, rtol=1e-3, atol=1e-6)


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
SPELLINGS = {
    "kohya, TrainTrain": (lambda layer: layer.key, KOHYA),
    "LyCORIS": (lambda layer: layer.key.replace("lora_unet", "lycoris"), KOHYA),
    "OneTrainer": (lambda layer: f"lora_unet.{layer.path}", KOHYA),
    "diffusers, PEFT": (lambda layer: f"unet.{layer.path}", ("lora_A.weight", "lora_B.weight", "")),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_a_file_of_another_program_is_trained_further(case, model, tmp_path, program) -> None:
    """The first loss is that of our own file of the same numbers, and the new file has learned more."""
    own = {"network_targets": "unet", "network_alpha": 1}
    if "first" not in _BEGUN:
        result = carry_out(case, model, "begun", train_learning_rate=0.02, **own)
        trace = engine_case.Trace()
        carry_out(case, model, "from-ours", trace, network_resume=str(result.path), **own)
        _BEGUN["first"] = result.path, trace.losses
    path, losses = _BEGUN["first"]
    tensors, _ = read_lora(path)
    name, tails = SPELLINGS[program]
    theirs = {}
    for layer in unet_layers(model.unet, "diffusers"):
        if f"{layer.key}.alpha" in tensors:
            for ours, tail in zip(KOHYA, tails, strict=True):
                theirs |= {f"{name(layer)}.{tail}": tensors[f"{layer.key}.{ours}"]} if tail else {}
    metadata = {} if tails[2] else {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata)
    trace = engine_case.Trace()
    result = carry_out(case, model, "further", trace, network_resume=str(tmp_path / "theirs.safetensors"), **own)
    assert trace.losses == losses
    further, _ = read_lora(result.path)
    assert further.keys() == tensors.keys() and any(not torch.equal(further[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks, ends_at", [([f"OUT{n:02}" for n in range(12)], "up"), (["IN01", "OUT00"], "down")])
def test_the_backward_pass_ends_at_the_first_trained_block(case, model, blocks, ends_at, checkpointing) -> None:
    """What no gradient flows through is known while the UNet predicts: its outputs ask for none."""
    unet = model.unet
    parts = {"conv_in": [unet.conv_in], "down": unet.down_blocks, "mid": [unet.mid_block], "up": unet.up_blocks}
    asking = {name: set() for name in parts}

    def listen(name: str):
        def heard(_, __, out) -> None:
            asking[name].add((out[0] if isinstance(out, tuple) else out).requires_grad)

        return heard

    hooks = [module.register_forward_hook(listen(name)) for name, modules in parts.items() for module in modules]
    try:
        own = {"network_blocks(BASE = TextEncoder)": blocks, "network_targets": "unet"}
        carry_out(case, model, "out", **own, use_gradient_checkpointing=checkpointing)
    finally:
        for hook in hooks:
            hook.remove()
    free = list(parts)[: list(parts).index(ends_at)]
    assert all(asking[name] == {False} for name in free) and True in asking[ends_at]


def test_every_layer_left_out_of_a_step_is_a_step_without_change(case, model) -> None:
    """One layer and a chance of 0.95: most steps have nothing to differentiate."""
    alone = {"network_module_dropout": 0.95, "network_name_filter": "*mid*attn2_to_q"}
    losses, tensors, _ = short(case, model, "lonely", **alone)
    assert len(losses) == 3 and len(tensors) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_block_ranks": "IN00"}, "network_block_ranks.*not block=number"),
        ({"network_block_alphas": "XX=3"}, "network_block_alphas.*no block"),
        ({"network_block_lrs": "IN00=0"}, "network_block_lrs.*above 0"),
        ({"network_block_lrs": "IN05=2"}, "network_block_lrs.*leaves out"),
        ({"network_init": "pissa", "network_resume": "a.safetensors"}, "network_init.*network_resume"),
        ({"network_max_norm": 1, "train_optimizer": "AdamWScheduleFree"}, "network_max_norm.*average"),
        ({"network_max_norm": 1, "network_init": "olora"}, "network_max_norm.*network_init"),
        ({"network_init": "best"}, "network_init.*default, pissa"),
        ({"network_dropout": 1}, "network_dropout.*0.95"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio"),
    ],
)
def test_what_cannot_be_is_refused_at_its_field(case, changes, message) -> None:
    with pytest.raises(JobError, match=message):
        load(case.settings(**{**SHORT, **changes}), catalogue())


def test_optimizers_with_one_step_size_refuse_other_rates(case, model) -> None:
    with pytest.raises(JobError, match="one step size for everything"):
        carry_out(case, model, "p", train_optimizer="Prodigy", train_learning_rate=1, loraplus_lr_ratio=4)


def test_a_text_encoder_file_is_used(case, tmp_path, plain) -> None:
    """`te` of the job: by its path or by its name in the folder of text encoders."""
    folder = case.places.text_encoders
    folder.mkdir(parents=True)
    other = tiny.encoder_file(folder / "other.safetensors", "sd1", 0, "hf")
    same = tiny.encoder_file(tmp_path / "same.safetensors", "sd1", 0, "hf", seed=0)
    only = {**SHORT, "train_iterations": 1}
    found = {}
    for name, te in (("same", f'"{same}"'), ("other", str(other)), ("named", "other")):
        trace = engine_case.Trace()
        case.run(trace, save_lora_name=f"te-{name}", te=te, **only)
        found[name] = trace.losses[1]
    assert found["same"] == plain[0][1] and found["other"] != plain[0][1] and found["named"] == found["other"]
    with pytest.raises(JobError, match="te.*no such text encoder"):
        case.run(save_lora_name="te-none", te="nothing", **only)
