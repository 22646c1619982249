"""Files of TrainTrain load unchanged, oddities included."""

from __future__ import annotations

import copy
import json

import pytest
from params_table import catalogue, traintrain_file

from trainer.errors import JobError
from trainer.params.codec import load
from trainer.params.core import Images, Log, Network, Pair, Save, Task, Train
from trainer.params.names import BLOCKS
from trainer.params.traintrain import is_traintrain

TABLE = catalogue()


def test_a_settings_file():
    loaded = load(traintrain_file(), TABLE)
    job = loaded.job
    assert loaded.warnings == () and job.traintrain and not job.unknown
    assert (job[Network].network_rank, job[Network].network_alpha, job[Network].network_element) == (16, 8.0, "Full")
    assert job[Network].network_blocks == BLOCKS
    assert (job[Train].train_optimizer, job[Train].train_learning_rate) == ("AdamW8bit", 5e-4)
    assert job[Train].train_lr_scheduler_settings == "eta_min=0.00001"
    assert (job[Train].train_textencoder_learning_rate, job[Train].train_seed) == (None, -1)
    assert (job[Images].image_size, job[Images].image_mirroring) == ((768, 512), True)
    assert job[Images].lora_data_directory == "C:\\pictures\\cat"
    assert (job[Task].vae, job[Task].te, job[Log].logging_save_csv, job[Save].save_as_json) == ("", "", False, True)
    assert job.second is None and job.unused_second is None


def test_real_numbers_of_older_files():
    raw = traintrain_file() | {
        "network_rank": 16.0,
        "train_learning_rate": 0.0005,
    }
    assert load(raw, TABLE).job == load(traintrain_file(), TABLE).job


def test_absent_keys_have_the_default():
    raw = {"image_size(height, width)": "512", "lora_data_directory": "x"}
    assert load(raw, TABLE).job[Network].network_rank == 16


def test_recognition():
    assert is_traintrain(traintrain_file())
    assert is_traintrain({"train_fixed_timsteps_in_batch": False})
    assert not is_traintrain({"network_rank": "16", "mode": "LoRA"})
    assert not is_traintrain(load(traintrain_file(), TABLE).job.to_dict(full=True))


def test_unknown_keys_are_kept_and_told():
    raw = traintrain_file() | {"train_new_thing": "5", "image_deep": {"a": [1, None]}}
    loaded = load(raw, TABLE)
    assert loaded.job.unknown == {"train_new_thing": "5", "image_deep": {"a": [1, None]}}
    assert loaded.warnings == ("Kept from TrainTrain, but without effect here: image_deep, train_new_thing.",)
    again = load(json.loads(json.dumps(loaded.job.to_dict())), TABLE)
    assert again == loaded


def test_kept_keys_are_copies():
    raw = traintrain_file() | {"thing": {"a": []}}
    job = load(raw, TABLE).job
    written = job.to_dict()
    raw["thing"]["a"].append(1)
    written["traintrain"]["thing"]["a"].append(2)
    assert job.unknown == {"thing": {"a": []}}


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, object(), "\ud800", 10**200])
def test_unknown_values_that_could_not_be_written_back(value):
    with pytest.raises(JobError, match="traintrain"):
        load(traintrain_file() | {"thing": value}, TABLE)


def test_origin_survives_without_unknown_keys():
    job = load(traintrain_file(), TABLE).job
    assert job.to_dict()["traintrain"] == {}
    assert load(job.to_dict(), TABLE).job.traintrain
    with pytest.raises(JobError, match="traintrain = 5"):
        load({"format": 1, "lora_data_directory": "x", "traintrain": 5}, TABLE)


@pytest.mark.parametrize(("key", "value"), [
    ("model", "z_image_turbo_bf16.safetensors"), ("model", "D:\\models\\Z-Image-Turbo.safetensors"),
    ("model", "zimage.safetensors"), ("te", "qwen_3_4b.safetensors"),
])  # fmt: skip
def test_z_image_is_refused(key, value):
    with pytest.raises(JobError, match=r"Z-Image, which cannot be trained here yet") as caught:
        load(traintrain_file() | {key: value, "network_rank": "bad"}, TABLE)
    assert [problem.field for problem in caught.value.problems] == [key]


@pytest.mark.parametrize("model", ["jazz_images.safetensors", "z-imago.safetensors", "z-image/sd15.safetensors"])
def test_other_models_are_not_z_image(model):
    assert load(traintrain_file() | {"model": model}, TABLE).job[Task].model == model


def difference(**second):
    inner = {key: value for key, value in traintrain_file().items() if key not in ("mode", "model", "vae", "te")}
    inner |= {"network_rank": "4", "network_alpha": "4", "train_learning_rate": "1e-4", "save_lora_name": ""} | second
    pictures = {"original image": "a.png", "target image": "b.png"}
    return traintrain_file() | pictures | {"mode": "Difference", "use_2nd_pass_settings": True, "2nd pass": inner}


def test_second_pass():
    job = load(difference(), TABLE).job
    assert job[Pair].use_2nd_pass_settings and job.second is not None
    assert (job[Network].network_rank, job.second[Network].network_rank) == (16, 4)
    assert (job.second[Train].train_learning_rate, job.second[Task].mode) == (1e-4, "Difference")
    assert load(job.to_dict(), TABLE).job == job
    assert load(job.to_dict(full=True), TABLE).job == job


def test_second_pass_takes_defaults_for_what_it_lacks():
    raw = difference()
    raw["2nd pass"] = {"network_rank": "4"}
    raw["train_batch_size"] = "7"
    second = load(raw, TABLE).job.second
    assert second is not None and second[Train].train_batch_size == 2 and second[Network].network_rank == 4


def test_second_pass_problems_say_where():
    with pytest.raises(JobError) as caught:
        load(difference(network_rank="many") | {"network_alpha": "few"}, TABLE)
    assert {problem.field for problem in caught.value.problems} == {"network_alpha", "2nd pass.network_rank"}


def test_second_pass_keeps_unknown_keys():
    loaded = load(difference(novelty=1), TABLE)
    assert loaded.job.second is not None and loaded.job.second.unknown == {"novelty": 1}
    assert "of the second pass" in loaded.warnings[0]
    assert load(loaded.job.to_dict(), TABLE) == loaded


@pytest.mark.parametrize("change", [{"use_2nd_pass_settings": False}, {"mode": "LoRA"}])
def test_unused_second_pass_is_kept_as_it_was(change):
    raw = difference(network_rank="not even a number") | change
    before = copy.deepcopy(raw)
    job = load(raw, TABLE).job
    assert job.second is None and job.to_dict()["2nd pass"] == before["2nd pass"]
    assert load(job.to_dict(), TABLE).job == job


@pytest.mark.parametrize("missing", [None, "", "None"])
def test_second_pass_missing(missing):
    with pytest.raises(JobError, match="is missing although use_2nd_pass_settings is on"):
        load(difference() | {"2nd pass": missing}, TABLE)
    assert load(traintrain_file() | {"2nd pass": missing}, TABLE).job.unused_second is None


@pytest.mark.parametrize("wrong", [5, [], "text", True])
def test_second_pass_of_a_wrong_type(wrong):
    with pytest.raises(JobError, match="must be an object"):
        load(difference() | {"2nd pass": wrong}, TABLE)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"mode": "iLECO", "network_rank": "4", "train_iterations": "300", "original prompt": "cat",
      "target prompt": "dog"}, 4),
    ({"mode": "ADDifT", "network_rank": "4", "network_alpha": "1", "train_optimizer": "CAME", "train_seed": "1",
      "train_min_timesteps": "500", "save_as_json": True, "original image": "a.png", "target image": "b.png"}, 4),
    ({"mode": "Multi-ADDifT", "diff_target_name": "_closed", "network_strength": "2"}, 16),
])  # fmt: skip
def test_other_modes(settings, expected):
    loaded = load(traintrain_file() | settings, TABLE)
    assert loaded.warnings == () and loaded.job[Network].network_rank == expected
    assert load(loaded.job.to_dict(), TABLE).job == loaded.job


def test_logs_are_written_unless_a_file_says_or_means_off():
    def log(**given):
        return load({"mode": "LoRA", **given}, TABLE, complete=False).job[Log].logging_save_csv

    theirs = {name: value for name, value in traintrain_file().items() if name != "logging_save_csv"}
    assert log(format=1) is True and log(format=1, logging_save_csv=False) is False
    for left_open in ({}, {"logging_save_csv": ""}, {"logging_save_csv": None}, {"logging_save_csv": False}):
        assert load({**theirs, **left_open}, TABLE).job[Log].logging_save_csv is False, left_open
    again = load({**theirs, "logging_save_csv": True}, TABLE).job
    assert again[Log].logging_save_csv is True
    kept = load(theirs, TABLE).job
    assert load(kept.to_dict(), TABLE).job[Log].logging_save_csv is False, "it stays off when it is written as ours"
