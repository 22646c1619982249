"""What the settings of kohya's scripts and of their GUI are called here: for hints, where one of them is typed."""

from __future__ import annotations

NAMES: dict[str, str] = {
    "pretrained_model_name_or_path": "model", "v_parameterization": "model_v_pred",
    "zero_terminal_snr": "model_zero_terminal_snr", "vae_path": "vae",
    "train_data_dir": "lora_data_directory", "image_dir": "lora_data_directory",
    "dataset_repeats": "image_num_multiply", "num_repeats": "image_num_multiply",
    "resolution": "image_size(height, width)", "max_resolution": "image_size(height, width)",
    "enable_bucket": "image_buckets_step", "bucket_reso_steps": "image_buckets_step",
    "min_bucket_reso": "image_min_length", "max_bucket_reso": "image_max_ratio",
    "bucket_no_upscale": "image_disable_upscale", "flip_aug": "image_mirroring", "trigger_word": "lora_trigger_word",
    "output_name": "save_lora_name", "save_every_n_epochs": "save_per_epochs", "save_every_n_steps": "save_per_steps",
    "save_state": "train_state_every", "no_metadata": "save_metadata", "log_with": "logging_trackers",
    "logging_dir": "logging_save_csv", "max_train_steps": "train_iterations", "max_train_epochs": "train_epochs",
    "epoch": "train_epochs", "num_epochs": "train_epochs", "batch_size": "train_batch_size",
    "gradient_accumulation_steps": "train_gradient_accumulation",
    "learning_rate": "train_learning_rate", "unet_lr": "train_learning_rate",
    "text_encoder_lr": "train_textencoder_learning_rate", "optimizer_type": "train_optimizer",
    "optimizer": "train_optimizer", "use_8bit_adam": "train_optimizer", "use_lion_optimizer": "train_optimizer",
    "optimizer_args": "train_optimizer_settings", "lr_scheduler": "train_lr_scheduler",
    "lr_scheduler_type": "train_lr_scheduler", "lr_scheduler_args": "train_lr_scheduler_settings",
    "lr_warmup_steps": "train_lr_warmup_steps", "lr_warmup": "train_lr_warmup_steps",
    "lr_scheduler_num_cycles": "train_lr_scheduler_num_cycles", "lr_scheduler_power": "train_lr_scheduler_power",
    "max_grad_norm": "train_max_grad_norm", "seed": "train_seed", "min_timestep": "train_min_timesteps",
    "max_timestep": "train_max_timesteps", "loss_type": "train_loss_function", "min_snr_gamma": "train_snr_gamma",
    "debiased_estimation_loss": "train_loss_weighting", "clip_skip": "train_clip_skip",
    "mixed_precision": "train_model_precision", "full_fp16": "train_lora_precision",
    "full_bf16": "train_lora_precision", "no_half_vae": "train_VAE_precision",
    "gradient_checkpointing": "use_gradient_checkpointing", "cache_latents": "data_cache",
    "cache_latents_to_disk": "data_cache", "cache_text_encoder_outputs": "data_cache",
    "network_module": "network_type", "lora_type": "network_type", "algo": "network_type",
    "network_dim": "network_rank", "dim": "network_rank", "alpha": "network_alpha", "conv_dim": "network_conv_rank",
    "conv_alpha": "network_conv_alpha", "network_weights": "network_resume",
    "lora_network_weights": "network_resume", "network_train_unet_only": "network_targets",
    "network_train_text_encoder_only": "network_targets", "rank_dropout": "network_rank_dropout",
    "module_dropout": "network_module_dropout", "scale_weight_norms": "network_max_norm",
    "block_dims": "network_block_ranks", "block_alphas": "network_block_alphas", "block_lr": "network_block_lrs",
    "down_lr_weight": "network_block_lrs", "mid_lr_weight": "network_block_lrs", "up_lr_weight": "network_block_lrs",
    "loraplus_unet_lr_ratio": "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio": "loraplus_te_lr_ratio",
    "factor": "network_factor", "decompose_both": "network_decompose_both", "full_matrix": "network_full_matrix",
    "use_tucker": "network_tucker", "use_cp": "network_tucker", "dora_wd": "use_dora", "rs_lora": "network_rslora",
    "unit": "network_unit", "sample_every_n_steps": "sample_every", "sample_every_n_epochs": "sample_every",
}  # fmt: skip
"""Name there, in lower case → key here. Names that are the same are left out."""

WITHOUT = frozenset({
    "adaptive_noise_scale", "alpha_mask", "caption_dropout_every_n_epochs", "caption_dropout_rate",
    "caption_tag_dropout_rate", "color_aug", "dataset_config", "face_crop_aug_range", "fp8_base", "huber_c",
    "huber_schedule", "ip_noise_gamma", "keep_tokens", "masked_loss", "multires_noise_discount",
    "multires_noise_iterations", "noise_offset", "random_crop", "reg_data_dir", "scale_v_pred_loss_like_noise_pred",
    "shuffle_caption", "stop_text_encoder_training", "token_warmup_step", "v_pred_like_loss", "weighted_captions",
})  # fmt: skip
"""What has no counterpart here and would change the training."""

NEEDLESS = frozenset({
    "caption_extension", "highvram", "lowram", "max_data_loader_n_workers", "max_token_length", "mem_eff_attn",
    "persistent_data_loader_workers", "save_model_as", "sdpa", "tokenizer_cache_dir", "v2", "vae_batch_size",
    "xformers",
})  # fmt: skip
"""What need not be said here."""


ELSEWHERE: dict[str, str] = {
    "output_dir": "is not a setting here: the LoRA goes to the WebUI's LoRA folder, or to --lora-dir.",
    "lycoris_preset": "is network_blocks, network_element and network_targets here.",
    "preset": "is network_blocks, network_element and network_targets here.",
}
"""What is chosen in another way here."""


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").lower()


def advice(name: str) -> str:
    """What to do with a setting of kohya's scripts."""
    return "Use that name." if _plain(name) in NAMES else "Remove it."


def hint(name: str) -> str:
    """` That is …` for a setting of kohya's scripts, "" for any other text."""
    plain = _plain(name)
    if plain in NAMES:
        return f" kohya's {plain} is {NAMES[plain]} here."
    if plain in ELSEWHERE:
        return f" kohya's {plain} {ELSEWHERE[plain]}"
    if plain in WITHOUT:
        return f" kohya's {plain} has no counterpart here."
    return f" kohya's {plain} need not be set here." if plain in NEEDLESS else ""
