"""Nothing is ignored or multiplied silently: what has no effect beside another setting is warned of or refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import engine_case
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data.dataset import arrange
from trainer.data.scan import scan
from trainer.engine.arguments import image_settings
from trainer.engine.build import make_network
from trainer.engine.catalogue import catalogue
from trainer.engine.idle import idle_here
from trainer.engine.preflight import cut_to_one_shape, too_few_copies
from trainer.errors import JobError
from trainer.events import EventLog
from trainer.optim.schedulers import SCHEDULERS, make_scheduler
from trainer.optim.settings import parse_settings
from trainer.params import kohya
from trainer.params.cli import apply_overrides, unknown_flag_hint
from trainer.params.codec import load
from trainer.params.files import read_json
from trainer.params.idle import RESTARTS

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"format": 1, "lora_data_directory": "x"}
PAIR = {"mode": "ADDifT", "original image": "a", "target image": "b"}
DIFFERENCE = {**PAIR, "mode": "Difference"}


def told(changes):
    """field → message of warnings and problems."""
    try:
        found = [str(line) for line in load({**GOOD, **changes}, catalogue()).warnings]
    except JobError as error:
        found = [str(problem) for problem in error.problems]
    return {line.split(" = ")[0]: line for line in found}


CASES = [  # settings, field that is told of, what mends it
    ({"train_loss_weighting": "debiased"}, "train_loss_weighting", {"train_snr_gamma": 0}),
    ({"train_epochs": 2, "train_iterations": 50}, "train_iterations", {"train_epochs": 0}),
    ({"train_lr_scheduler_num_cycles": 3}, "train_lr_scheduler_num_cycles", {"train_lr_scheduler": "cyclic"}),
    ({"train_lr_scheduler_power": 2}, "train_lr_scheduler_power", {"train_lr_scheduler": "polynomial"}),
    ({"train_lr_step_rules": "1:10,0.1"}, "train_lr_step_rules", {"train_lr_scheduler": "piecewise_constant"}),
    ({"train_lr_scheduler": "piecewise_constant"}, "train_lr_step_rules", {"train_lr_step_rules": "1:10,0.1"}),
    ({"train_lr_scheduler": "constant_with_warmup"}, "train_lr_scheduler", {"train_lr_warmup_steps": 5}),
    ({"train_lr_scheduler": "cosine_with_restarts", "train_lr_scheduler_num_cycles": 40, "train_iterations": 12},
     "train_lr_scheduler_num_cycles", {"train_iterations": 40}),
    ({"train_lr_scheduler": "cosine_with_restarts", "train_lr_scheduler_num_cycles": 40, "train_iterations": 45,
      "train_lr_warmup_steps": 10}, "train_lr_scheduler_num_cycles", {"train_lr_warmup_steps": 5}),
    ({"save_per_steps": 1000}, "save_per_steps", {"save_per_steps": 999}),
    ({"save_per_epochs": 3, "train_epochs": 3}, "save_per_epochs", {"save_per_epochs": 2}),
    ({"sample_every": 1001, "sample_prompts": "a"}, "sample_every", {"sample_every": 1000}),
    ({"sample_prompts": "a"}, "sample_prompts", {"sample_every": 10}),
    ({"sample_steps": 5}, "sample_steps", {"sample_every": 10, "sample_prompts": "a"}),
    ({"sample_cfg": 5}, "sample_cfg", {"sample_every": 10, "sample_prompts": "a"}),
    ({"sample_seed": 5}, "sample_seed", {"sample_every": 10, "sample_prompts": "a"}),
    ({"train_textencoder_learning_rate": 0}, "train_textencoder_learning_rate",
     {"train_textencoder_learning_rate": None}),
    ({"train_textencoder_learning_rate": 1e-5, "network_targets": "unet"}, "train_textencoder_learning_rate",
     {"network_targets": "both"}),
    ({"train_textencoder_learning_rate": 1e-5, "network_element": "SelfAttention"}, "train_textencoder_learning_rate",
     {"network_element": "Full"}),
    ({"network_targets": "text_encoder", "network_element": "SelfAttention"}, "network_element",
     {"network_targets": "unet"}),
    ({"network_targets": "text_encoder", "train_textencoder_learning_rate": 0}, "train_textencoder_learning_rate",
     {"train_textencoder_learning_rate": 1e-4}),
    ({"image_size(height, width)": 64, "image_min_length": 256}, "image_min_length", {"image_min_length": 64}),
    ({"image_size(height, width)": "384,768", "image_min_length": 448}, "image_min_length", {"image_min_length": 384}),
    ({"network_conv_rank": 4}, "network_conv_rank", {"network_type": "c3lier"}),
    ({"network_conv_alpha": 4, "network_type": "null"}, "network_conv_alpha", {"network_conv_rank": 4}),
    ({"network_conv_alpha": 4, "network_type": "dylora"}, "network_conv_alpha", {"network_type": "loha"}),
    ({"train_fixed_timsteps_in_batch": True, "train_batch_size": 1}, "train_fixed_timsteps_in_batch",
     {"train_batch_size": 2}),
    ({"train_traintrain_compatible": True, "train_max_grad_norm": 1}, "train_max_grad_norm",
     {"train_max_grad_norm": 0}),
    ({**DIFFERENCE, "diff_1st_pass_only": True, "use_2nd_pass_settings": True, "2nd pass": {"network_rank": 4}},
     "use_2nd_pass_settings", {"diff_1st_pass_only": False}),
    ({**DIFFERENCE, "diff_1st_pass_only": True, "diff_load_1st_pass": "c"}, "diff_1st_pass_only",
     {"diff_load_1st_pass": ""}),
    ({**DIFFERENCE, "network_resume": "d", "diff_load_1st_pass": "c"}, "network_resume", {"diff_load_1st_pass": ""}),
    ({**PAIR, "lora_trigger_word": "x", "train_traintrain_compatible": True}, "lora_trigger_word",
     {"train_traintrain_compatible": False}),
    ({**PAIR, "diff_use_diff_mask": True, "train_traintrain_compatible": True}, "diff_use_diff_mask",
     {"train_traintrain_compatible": False}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "network_train_text_encoder": True,
      "network_targets": "unet"}, "network_train_text_encoder", {"network_targets": "both"}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "ileco_anchors": "c", "ileco_anchor_weight": 0},
     "ileco_anchors", {"ileco_anchor_weight": 2}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "ileco_anchor_weight": 2,
      "train_traintrain_compatible": True}, "ileco_anchor_weight", {"train_traintrain_compatible": False}),
    ({"train_lr_scheduler": "piecewise_constant", "train_lr_step_rules": "1:10,0.1:90,0.01", "train_iterations": 50},
     "train_lr_step_rules", {"train_iterations": 91}),
    ({"mode": "Instant", "original prompt": "a", "sample_every": 5, "sample_prompts": "a"}, "sample_every",
     {"mode": "iLECO", "target prompt": "b"}),
    ({"mode": "Instant", "original prompt": "a", "train_state_every": 5}, "train_state_every",
     {"mode": "iLECO", "target prompt": "b"}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "vae": "v"}, "vae",
     {"sample_every": 5, "sample_prompts": "a"}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "train_VAE_precision": "fp16"},
     "train_VAE_precision", {"sample_every": 5, "sample_prompts": "a"}),
    ({"mode": "iLECO", "original prompt": "a", "target prompt": "b", "train_traintrain_compatible": True,
      "train_fixed_timsteps_in_batch": True}, "train_fixed_timsteps_in_batch", {"train_traintrain_compatible": False}),
    ({"export_format": "lora", "export_max_error": 0.1}, "export_max_error", {"export_format": "auto",
                                                                            "use_dora": True}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "mended"), CASES, ids=[f"{n}-{case[1]}" for n, case in enumerate(CASES)])
def test_what_has_no_effect_is_told(changes, field, mended):
    assert field in told(changes)
    assert field not in told({**changes, **mended})


def test_every_parameter_is_read_by_something_that_acts_on_it():
    """A name that occurs in the table alone, and in rules, can change nothing."""
    read = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        if path.parent.name == "params":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                read.add(node.value)
    by_codec = {"format", "use_2nd_pass_settings"}  # decide how a file is read
    parameters = [one for one in catalogue().parameters if one.spec.implies is None]
    assert [one.key for one in parameters if one.attribute not in read | by_codec] == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_value_that_a_mode_does_not_show_is_told_and_has_no_effect(data):
    """Any parameter, any mode and type: hidden and changed means a warning, and a job that is as without it."""
    table = catalogue()
    mode = data.draw(st.sampled_from(sorted(table.modes)))
    kind = data.draw(st.sampled_from(sorted(table.types)))
    parameter = data.draw(st.sampled_from(table.parameters))
    if parameter.attribute in ("format", "mode", "network_type", "train_seed") or parameter.spec.implies:
        return
    value = other_value(parameter, table)
    base = {"format": 1, "mode": mode, **({} if mode == "Instant" else {"network_type": kind})}
    try:
        changed = load({**base, parameter.key: value}, table, complete=True)
        plain = load(base, table, complete=True)
    except JobError:
        try:  # what a run needs is not there
            changed, plain = (load(raw, table, complete=False) for raw in ({**base, parameter.key: value}, base))
        except JobError:
            return
        if not hidden(parameter, table, mode, kind):
            return
        assert table.in_effect(changed.job) == table.in_effect(plain.job)
        return
    if hidden(parameter, table, mode, kind):
        assert any(line.startswith(f"{parameter.key} has no effect") for line in changed.warnings), parameter.key
        assert table.in_effect(changed.job) == table.in_effect(plain.job)
    else:
        assert table.in_effect(changed.job) != table.in_effect(plain.job)


def hidden(parameter, table, mode, kind):
    return not parameter.shown_in(table.tags(table.modes[mode], kind))


def other_value(parameter, table):
    """A value that is allowed and not the default."""
    choices = [one for one in table.choices_of(parameter) if one != parameter.default]
    if parameter.kind == "bool":
        return not parameter.default
    if parameter.kind == "list":
        return choices[:1]
    if parameter.kind == "size":
        return "256"
    if parameter.kind == "text":
        return choices[0] if choices else "a"
    step = parameter.spec.multiple or 1
    low, high = parameter.spec.low or 0, parameter.spec.high
    near = [low + step, low, high]
    return next(one for one in near if one is not None and one != parameter.default and one <= (high or one))


def test_a_second_pass_tells_of_what_it_takes_from_the_first():
    second = {"network_rank": 4, "train_epochs": 3, "lora_trigger_word": "x", "save_lora_name": "y", "sample_every": 5}
    raw = {**GOOD, **DIFFERENCE, "use_2nd_pass_settings": True, "2nd pass": second}
    found = [line for line in load(raw, catalogue()).warnings if line.startswith("2nd pass.")]
    assert {line.split(" ")[1].partition(".")[2] for line in found} == {*second} - {"network_rank"}
    assert all("has no effect" in line for line in found)


def test_what_only_the_model_tells(tmp_path):
    """velocity with v-prediction, patterns and blocks that meet no layer."""
    model = tiny.model("sd2", v_pred=True)
    raw = {**GOOD, "train_loss_weighting": "velocity", "network_name_filter": "*attn2*;*nowhere*;!*to_out*;!*absent*",
           "network_block_ranks": "OUT*=2;IN00=8;M00=4"}  # fmt: skip
    job = load(raw, catalogue()).job
    lines = list(idle_here(job, model, make_network(job, model, 1, EventLog())))
    assert "velocity has no effect" in lines[0]
    assert ["*nowhere*" in lines[1], "!*absent*" in lines[2], "IN00=8" in lines[3]] == [True] * 3 and len(lines) == 4
    plain = load(GOOD, catalogue()).job
    assert not list(idle_here(plain, model, make_network(plain, model, 1, EventLog())))


def test_schedules_that_restart_are_those_of_the_registry():
    assert set(RESTARTS) == {name for name, recipe in SCHEDULERS.items() if recipe.restarts}


def test_more_restarts_than_steps_are_refused_when_epochs_decide_the_steps():
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(JobError, match=r"train_lr_scheduler_num_cycles = 40: is more than the 12 steps"):
        make_scheduler("cosine_with_restarts", optimizer, total_steps=12, cycles=40)
    with pytest.raises(JobError, match=r"num_cycles=3': is set by train_lr_scheduler_num_cycles too"):
        make_scheduler("cosine_with_restarts", optimizer, total_steps=12, cycles=2, settings={"num_cycles": 3})


@pytest.mark.parametrize("text", ["betas=(0.9,0.99), weight_decay=0.01", "eps=1e-8,weight_decay=0.1",
                                  "weight_decay=0.1 betas=(0.9,0.99)"])  # fmt: skip
def test_pairs_with_commas_between_are_told_of_the_separator(text):
    with pytest.raises(JobError, match="Separate them by ; or line ends, not by commas"):
        parse_settings(text)
    assert parse_settings("betas=0.9,0.99") == {"betas": (0.9, 0.99)}


def test_names_of_kohyas_scripts_get_the_right_hint():
    raw = {"network_dim": 32, "train_data_dir": "D:/x", "Network_Dim": 1, "shuffle_caption": True, "xformers": True,
           "netwrk_rank": 4}  # fmt: skip
    with pytest.raises(JobError) as caught:
        load({"format": 1, **raw}, catalogue())
    told = {problem.field: problem.message for problem in caught.value.problems}
    assert "kohya's network_dim is network_rank here" in told["network_dim"] == told["Network_Dim"]
    assert "is lora_data_directory here" in told["train_data_dir"] and "no counterpart" in told["shuffle_caption"]
    assert "need not be set" in told["xformers"] and "Did you mean network_rank" in told["netwrk_rank"]
    with pytest.raises(JobError, match="kohya's network_dim is network_rank here"):
        apply_overrides({}, ["network_dim=8"], catalogue())
    assert "is network_rank here" in unknown_flag_hint(["--network_dim=8"], catalogue())
    assert "--lora-dir" in kohya.hint("output_dir") and "network_element" in kohya.hint("LyCORIS_preset")
    keys = {parameter.key for parameter in catalogue().parameters}
    assert set(kohya.NAMES.values()) <= keys and not (set(kohya.NAMES) | kohya.WITHOUT | kohya.NEEDLESS) & keys
    assert not set(kohya.NAMES) & (kohya.WITHOUT | kohya.NEEDLESS)


def test_the_default_of_the_shortest_side_is_warned_of_only_where_it_cuts_images(tmp_path):
    case = engine_case.make(tmp_path)
    unset = case.job(image_min_length=512)
    assert not list(cut_to_one_shape(unset, scan(image_settings(unset)))), "square images lose nothing"
    wide = next(case.pictures.glob("*.png"))
    with Image.open(wide) as picture:
        wider = picture.resize((96, 64))
    wider.save(wide)
    (line,) = cut_to_one_shape(unset, scan(image_settings(unset)))
    assert line.startswith("1 of 6 images have another shape than 64×64") and "Set it to 64 or less" in line
    chosen = case.job(image_min_length=64, image_buckets_step=32)
    assert not list(cut_to_one_shape(chosen, scan(image_settings(chosen))))


def test_toml_is_told_to_be_kohyas(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model_arguments]\npretrained_model_name_or_path = "x"\n', encoding="utf-8")
    with pytest.raises(JobError, match=re.escape("in TOML are not read; write them as JSON")):
        read_json(path)


def test_smaller_copies_without_a_bucket_are_told(tmp_path):
    case = engine_case.make(tmp_path)
    job = case.job(sub_image_num=3, image_num_multiply=2)
    lines = list(too_few_copies(job, scan(image_settings(job))))
    assert len(lines) == 1 and "sub_image_num is 3, but there are 0 smaller buckets" in lines[0]
    report = arrange(scan(image_settings(job)).pictures, image_settings(job)).summary()
    assert report["smaller copies"].startswith("0 of 3") and report["repeats times image_num_multiply"] == 2
    wider = case.job(sub_image_num=3, image_min_length=32, image_buckets_step=8)
    assert not list(too_few_copies(wider, scan(image_settings(wider))))
