"""A catalogue with all of TrainTrain's modes, and a settings file as TrainTrain writes it."""

from __future__ import annotations

from trainer.params import core
from trainer.params.codec import Catalogue, ModeInfo
from trainer.params.names import BLOCKS

RUN = frozenset({"run", "steps"})
MODES = {
    "LoRA": ModeInfo("LoRA", "From a folder.", RUN | {"folder", "size", "trigger", "resume", "te_rate"}),
    "iLECO": ModeInfo("iLECO", "From prompts.", RUN | {"prompts", "size", "te_train"}),
    "Difference": ModeInfo(
        "Difference",
        "From two images, one after the other.",
        RUN | {"prompts", "pictures", "folder", "trigger", "resume", "first_pass"},
        second=frozenset({"second", "steps"}),
    ),
    "ADDifT": ModeInfo("ADDifT", "From two images.", RUN | {"prompts", "pictures", "trigger", "pair"}),
    "Multi-ADDifT": ModeInfo(
        "Multi-ADDifT", "From pairs.", RUN | {"folder", "pair_name", "trigger", "size", "resume", "pair"}
    ),
}


def catalogue() -> Catalogue:
    """The core parameters, five modes, three adapter types."""
    return Catalogue(
        core.SECTIONS,
        MODES,
        choices={"network_type": ("lierla", "c3lier", "loha")},
        aliases={"network_type": {"lora": "lierla", "locon": "c3lier"}},
    )


def traintrain_file() -> dict[str, object]:
    """A LoRA settings file in TrainTrain's spelling: text for numbers, "" and "None" for what is not set."""
    return {
        "network_type": "lierla",
        "network_rank": "16",
        "network_alpha": "8",
        "lora_data_directory": "C:\\pictures\\cat",
        "diff_target_name": "",
        "lora_trigger_word": "",
        "image_size(height, width)": "768,512",
        "train_iterations": "1000",
        "train_batch_size": "2",
        "train_learning_rate": "5e-4",
        "train_optimizer": "adamw8BIT",
        "train_optimizer_settings": "",
        "train_lr_scheduler": "cosine_annealing",
        "train_lr_scheduler_settings": "eta_min=0.00001",
        "save_lora_name": "cat",
        "use_gradient_checkpointing": False,
        "network_blocks(BASE = TextEncoder)": list(BLOCKS),
        "network_resume": "",
        "network_strength": "1.0",
        "network_conv_rank": "0",
        "network_conv_alpha": "0",
        "network_element": "None",
        "network_train_text_encoder": False,
        "image_buckets_step": "256",
        "image_num_multiply": "1",
        "image_min_length": 512,
        "image_max_ratio": "2.0",
        "sub_image_num": "0",
        "image_mirroring": True,
        "image_use_filename_as_tag": False,
        "image_disable_upscale": False,
        "train_fixed_timsteps_in_batch": False,
        "train_textencoder_learning_rate": "",
        "train_seed": "-1",
        "train_min_timesteps": "0",
        "train_max_timesteps": "1000",
        "train_loss_function": "MSE",
        "train_lr_step_rules": "",
        "train_lr_warmup_steps": "0",
        "train_lr_scheduler_num_cycles": "1",
        "train_lr_scheduler_power": "1.0",
        "train_snr_gamma": "5.0",
        "save_per_steps": "0",
        "diff_alt_ratio": "1",
        "diff_revert_original_target": False,
        "diff_use_diff_mask": False,
        "train_model_precision": "fp16",
        "train_lora_precision": "fp32",
        "save_precision": "fp16",
        "train_VAE_precision": "fp32",
        "diff_load_1st_pass": "",
        "diff_save_1st_pass": False,
        "diff_1st_pass_only": False,
        "logging_save_csv": "",
        "logging_verbose": False,
        "save_overwrite": False,
        "save_as_json": True,
        "model_v_pred": False,
        "use_2nd_pass_settings": False,
        "mode": "LoRA",
        "model": "model.safetensors",
        "vae": "None",
        "te": "None",
        "original prompt": "",
        "target prompt": "",
    }
