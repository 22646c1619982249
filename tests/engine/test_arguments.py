"""Every parameter arrives where it acts: set to a value of its own, it is found in the record that the engine works
with.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.engine import arguments
from trainer.engine.catalogue import catalogue
from trainer.errors import JobError
from trainer.params.codec import load

START = {"format": 1, "mode": "LoRA", "lora_data_directory": "pictures"}


def job(**changes):
    return load({**START, **changes}, catalogue()).job


@pytest.mark.parametrize(
    ("key", "value", "record", "field", "expected"),
    [
        ("lora_data_directory", "elsewhere", arguments.image_settings, "folder", Path("elsewhere")),
        ("lora_trigger_word", "sks", arguments.image_settings, "trigger", "sks"),
        ("image_size(height, width)", "96,160", arguments.image_settings, "size", (96, 160)),
        ("image_buckets_step", 72, arguments.image_settings, "buckets_step", 72),
        ("image_num_multiply", 7, arguments.image_settings, "multiply", 7),
        ("image_min_length", 88, arguments.image_settings, "min_length", 88),
        ("image_max_ratio", 3.5, arguments.image_settings, "max_ratio", 3.5),
        ("sub_image_num", 5, arguments.image_settings, "sub_images", 5),
        ("image_mirroring", True, arguments.image_settings, "mirroring", True),
        ("image_use_filename_as_tag", True, arguments.image_settings, "filename_as_tag", True),
        ("image_disable_upscale", True, arguments.image_settings, "disable_upscale", True),
        ("data_skip_broken", True, arguments.image_settings, "skip_broken", True),
        ("train_loss_function", "L1", arguments.loss_settings, "distance", "L1"),
        ("train_loss_weighting", "velocity", arguments.loss_settings, "weighting", "velocity"),
        ("train_snr_gamma", 2.5, arguments.loss_settings, "snr_gamma", 2.5),
        ("train_min_timesteps", 123, arguments.loss_settings, "low", 123),
        ("train_max_timesteps", 456, arguments.loss_settings, "high", 456),
        ("train_fixed_timsteps_in_batch", True, arguments.loss_settings, "fixed_timesteps", True),
        ("network_rank", 13, arguments.adapter_spec, "rank", 13),
        ("network_alpha", 6.5, arguments.adapter_spec, "alpha", 6.5),
        ("network_conv_rank", 3, arguments.adapter_spec, "conv_rank", 3),
        ("network_conv_alpha", 1.5, arguments.adapter_spec, "conv_alpha", 1.5),
        ("network_type", "c3lier", arguments.adapter_spec, "type", "c3lier"),
        ("sample_steps", 9, arguments.sample_settings, "steps", 9),
        ("sample_cfg", 3.5, arguments.sample_settings, "cfg", 3.5),
        ("sample_seed", 77, arguments.sample_settings, "seed", 77),
        ("train_clip_skip", 2, arguments.sample_settings, "clip_skip", 2),
    ],
)
def test_a_value_arrives(key, value, record, field, expected):
    assert getattr(record(job(**{key: value})), field) == expected


def test_the_numbers_of_the_loop():
    made = arguments.limits(
        job(
            train_iterations=10,
            train_gradient_accumulation=3,
            train_max_grad_norm=0.5,
            train_state_every=7,
            sample_every=4,
            sample_prompts="a",
            save_per_steps=4,
            train_batch_size=2,
        ),
        batches_per_epoch=9,
        processes=2,
    )
    assert (made.total_steps, made.accumulation, made.max_grad_norm, made.state_every, made.sample_every) == (
        10,
        3,
        0.5,
        7,
        4,
    )
    assert made.save_steps == {4, 8} and made.batch_size == 4
    by_epoch = arguments.limits(job(train_epochs=4, save_per_epochs=2, train_gradient_accumulation=3), 9, 1)
    assert by_epoch.total_steps == 12 and by_epoch.save_steps == {6}


def test_rates_and_parts():
    given = job(train_learning_rate=3e-4, train_textencoder_learning_rate=5e-5)
    assert arguments.rates(given) == {"unet": 3e-4, "te1": 5e-5, "te2": 5e-5}
    assert arguments.rates(job(train_learning_rate=3e-4))["te1"] == 3e-4
    assert set(arguments.parts(job(network_targets="text_encoder"), ())) == {"te1", "te2"}
    assert set(arguments.parts(job(network_targets="unet"), ())) == {"unet"}


def test_precisions():
    assert arguments.precision("bf16", "x") is torch.bfloat16 and arguments.precision("model", "x") is None
    with pytest.raises(JobError, match="int8"):
        arguments.precision("int8", "train_model_precision")
