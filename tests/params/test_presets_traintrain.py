"""Presets under TrainTrain's names hold TrainTrain's values, written down here from its presets folder (7b58929)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.engine import arguments
from trainer.engine.catalogue import catalogue
from trainer.params import core
from trainer.params.codec import load
from trainer.params.names import BLOCKS
from trainer.params.presets import Presets

SHIPPED = Presets(Path(__file__).resolve().parents[2] / "presets")
DEFAULTS: dict[str, object] = {  # of its form, for every parameter that its files carry
    "network_type": "lierla", "network_rank": 16, "network_alpha": 8, "lora_data_directory": "", "diff_target_name": "",
    "lora_trigger_word": "", "image_size(height, width)": 512, "train_iterations": 1000, "train_batch_size": 2,
    "train_learning_rate": 1e-4, "train_optimizer": "AdamW", "train_optimizer_settings": "",
    "train_lr_scheduler": "cosine", "train_lr_scheduler_settings": "", "save_lora_name": "",
    "use_gradient_checkpointing": False, "network_blocks(BASE = TextEncoder)": list(BLOCKS), "network_resume": "",
    "network_strength": 1, "network_conv_rank": 0, "network_conv_alpha": 0, "network_element": "Full",
    "network_train_text_encoder": False, "image_buckets_step": 256, "image_num_multiply": 1, "image_min_length": 512,
    "image_max_ratio": 2, "sub_image_num": 0, "image_mirroring": False, "image_use_filename_as_tag": False,
    "image_disable_upscale": False, "train_fixed_timsteps_in_batch": False, "train_textencoder_learning_rate": None,
    "train_seed": -1, "train_min_timesteps": 0, "train_max_timesteps": 1000, "train_loss_function": "MSE",
    "train_lr_step_rules": "", "train_lr_warmup_steps": 0, "train_lr_scheduler_num_cycles": 1,
    "train_lr_scheduler_power": 1, "train_snr_gamma": 5, "save_per_steps": 0, "diff_alt_ratio": 1,
    "diff_revert_original_target": False, "diff_use_diff_mask": False, "train_model_precision": "fp16",
    "train_lora_precision": "fp32", "save_precision": "fp16", "train_VAE_precision": "fp32", "diff_load_1st_pass": "",
    "diff_save_1st_pass": False, "diff_1st_pass_only": False, "logging_verbose": False, "save_overwrite": False,
    "save_as_json": False, "model_v_pred": False, "use_2nd_pass_settings": False,
    "model": "", "vae": "", "te": "", "original prompt": "", "target prompt": "",
}  # fmt: skip
ADDIFT = {
    "mode": "ADDifT", "network_rank": 4, "network_alpha": 1, "train_batch_size": 1, "train_optimizer": "CAME",
    "train_lr_scheduler": "cosine_annealing", "train_lr_scheduler_settings": "eta_min=0.00001", "save_as_json": True,
    "logging_save_csv": False,
}  # fmt: skip
UNET_ALONE = {"network_blocks(BASE = TextEncoder)": list(BLOCKS[1:])}
EXPECTED: dict[str, dict[str, object]] = {
    "LoRA": {"mode": "LoRA", "save_lora_name": "LoRA"},
    "iLECO": {"mode": "iLECO", "network_rank": 4, "train_iterations": 300, "train_learning_rate": 5e-4,
              "save_lora_name": "iLECO"},
    "Difference": {"mode": "Difference", "network_alpha": 16, "train_iterations": 500, "train_learning_rate": 5e-4,
                   "save_lora_name": "Difference"},
    "Difference_Use2ndPass": {"mode": "Difference", "network_alpha": 16, "train_iterations": 500,
                              "train_learning_rate": 5e-4, "save_lora_name": "Difference_Use2ndPass",
                              "use_2nd_pass_settings": True},
    "ADDifT_Action_SD1.5": {**ADDIFT, "train_iterations": 30, "train_learning_rate": 1e-4, "train_seed": 1,
                            "train_min_timesteps": 500, "save_lora_name": "ADDifT_Action_SD1.5"},
    "ADDifT_Action_XL": {**ADDIFT, **UNET_ALONE, "train_iterations": 30, "train_learning_rate": 2e-4, "train_seed": 1,
                         "train_min_timesteps": 500, "save_lora_name": "ADDifT_Action_SDXL"},
    "ADDifT_Style_SD1.5": {**ADDIFT, "train_iterations": 50, "train_learning_rate": 5e-5, "train_seed": 1,
                           "train_min_timesteps": 200, "train_max_timesteps": 400, "network_strength": 5,
                           "diff_revert_original_target": True, "save_lora_name": "ADDifT_Style_SD1.5"},
    "ADDifT_Style_XL": {**ADDIFT, **UNET_ALONE, "train_iterations": 30, "train_learning_rate": 2e-4,
                        "train_min_timesteps": 200, "train_max_timesteps": 400, "train_snr_gamma": 1,
                        "network_strength": 2, "diff_revert_original_target": True,
                        "save_lora_name": "ADDifT_Style_SDXL"},
}  # fmt: skip
SECOND = {"network_rank": 4, "network_alpha": 4, "train_iterations": 500, "train_learning_rate": 1e-4}
OURS = {"iLECO_Instant", "ADDifT_Projected_SD1.5", "ADDifT_Projected_XL", "ADDifT_Background", "ADDifT_Background_Held",
        "Difference_Background", "Difference_Residual"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_preset_of_that_name_holds_its_values(name):
    job = SHIPPED.load(name, catalogue()).job
    held = job.to_dict(full=True)
    wanted = {**DEFAULTS, **EXPECTED[name]}
    assert {key: held[key] for key in wanted} == wanted
    assert arguments.max_grad_norm(job) == 0  # it clips nothing
    ours = {key: value for key, value in job.to_dict().items() if key not in wanted}
    ours.pop("2nd pass", None)
    assert ours == {"format": 1, "train_max_grad_norm": 0.0}  # and nothing that it does not know
    if "use_2nd_pass_settings" in EXPECTED[name]:
        second = job.second.to_dict(full=True)
        later = {**DEFAULTS, **SECOND, "mode": "Difference"}
        assert {key: second[key] for key in later} == later and arguments.max_grad_norm(job.second) == 0


def test_the_others_have_names_of_their_own_and_say_where_they_come_from():
    assert {name for name in SHIPPED.shipped() if "demo model" in SHIPPED.note(name)} == OURS
    assert not OURS & set(EXPECTED) and set(EXPECTED) | OURS <= set(SHIPPED.shipped())
    assert all("TrainTrain" in SHIPPED.note(name) for name in EXPECTED)
    assert SHIPPED.note("LoRA_LoHa") == ""


def test_a_note_is_for_people(tmp_path):
    raw = {"format": 1, "note": "Try it.", "network_rank": 4}
    assert load(raw, catalogue(), complete=False) == load({"format": 1, "network_rank": 4}, catalogue(), complete=False)
    (tmp_path / "mine.json").write_text(json.dumps({**raw, "note": 5}), encoding="utf-8")
    assert Presets(tmp_path).note("mine") == ""


def test_its_settings_files_mean_no_clipping_and_ours_mean_one():
    own = {"image_size(height, width)": "512", "lora_data_directory": "x"}
    ours = {"format": 1, "lora_data_directory": "x"}
    assert arguments.max_grad_norm(load(own, catalogue()).job) == 0
    assert arguments.max_grad_norm(load(ours, catalogue()).job) == 1
    by_rule = load({**ours, "train_traintrain_compatible": True}, catalogue())
    assert arguments.max_grad_norm(by_rule.job) == 0 and not by_rule.warnings
    asked = load({**ours, "train_traintrain_compatible": True, "train_max_grad_norm": 0.5}, catalogue())
    assert arguments.max_grad_norm(asked.job) == 0.5 and "TrainTrain never does" in asked.warnings[0]
    again = load(json.loads(json.dumps(by_rule.job.to_dict(full=True))), catalogue()).job
    assert again[core.Train].train_max_grad_norm is None and arguments.max_grad_norm(again) == 0
