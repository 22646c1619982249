"""Values under kohya's metadata keys are what sd-scripts would write there, by its formulas (48d368f)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from types import SimpleNamespace

import engine_case
import pytest
import tiny

from trainer.adapters.metadata import FileFacts, base_names, build_metadata
from trainer.engine.catalogue import catalogue
from trainer.engine.output import facts

pytestmark = pytest.mark.usefixtures("no_estimate")
TRAIN = {"train_batch_size": 2, "train_gradient_accumulation": 3, "train_epochs": 4, "image_num_multiply": 5,
         "image_mirroring": True, "train_optimizer_settings": "weight_decay=0.1;eps=1e-7", "network_targets": "unet",
         "train_loss_function": "Smooth-L1", "network_dropout": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("metadata"))


@pytest.fixture
def written(case, tmp_path):
    """What a file of a job says; the model lies in a file of 2 MiB."""

    def make(v_pred=False, processes=1, **changes):
        model = tiny.model("sd1", v_pred=v_pred)
        model.path = tmp_path / "My model.v1.safetensors"
        model.path.write_bytes(bytes(range(256)) * 8192)
        made = engine_case.session(case, case.job(**{**TRAIN, **changes}), model)
        made.network.eject()
        made.process = SimpleNamespace(count=processes)
        made.step = made.limits.total_steps
        return build_metadata(facts(made, "cat", {})), made

    return make


def test_values(written):
    said, made = written()
    content = made.model.path.read_bytes()
    batches = math.ceil(6 * 5 * 2 / 2)  # pictures × repeats × mirrored copies in batches of two
    steps = math.ceil(4 * batches / 3)
    wanted = {
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
        "ss_sd_model_name": "My model.v1.safetensors",
        "ss_num_train_images": str(5 * 6),
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": str(batches),
        "ss_num_epochs": str(math.ceil(steps / math.ceil(batches / 3))),
        "ss_epoch": "4",
        "ss_max_train_steps": str(steps),
        "ss_total_batch_size": str(2 * 1 * 3),
        "ss_batch_size_per_device": "2",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,eps=1e-07)",
        "ss_loss_type": "smooth_l1",
        "ss_base_model_version": "sd_v1",
        "ss_zero_terminal_snr": "False",
        "ss_flip_aug": "True",
        "ss_cache_latents": "True",
        "ss_network_dropout": "0.1",
        "ss_max_grad_norm": "1.0",
        "ss_v2": "False",
    }
    assert {key: said.get(key) for key in wanted} == wanted
    assert "ss_text_encoder_lr" not in said  # it was not trained
    assert 0 <= int(said["ss_session_id"]) < 2**32
    (folder,) = json.loads(said["ss_dataset_dirs"]).values()
    assert folder == {"n_repeats": 5, "img_count": 6}


def test_processes_prediction_and_schedule(written):
    said, made = written(v_pred=True, processes=3, train_optimizer="SGDNesterov", train_optimizer_settings="",
                         network_targets="both", train_loss_function="MSE")  # fmt: skip
    assert said["ss_total_batch_size"] == str(2 * 3 * 3) and said["ss_base_model_version"] == "sd_v1_v"
    assert said["ss_optimizer"] == "torch.optim.sgd.SGD" and said["ss_loss_type"] == "l2"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["modelspec.prediction_type"] == "v"
    assert said["ss_text_encoder_lr"] == said["ss_unet_lr"] == "0.001"
    made.model.process = made.model.process.ending_in_noise()
    assert build_metadata(facts(made, "cat", {}))["ss_zero_terminal_snr"] == "True"


def test_all_files_of_a_run_have_one_session_id(written):
    first, made = written()
    made.step = 1
    assert build_metadata(facts(made, "cat_1steps", {}))["ss_session_id"] == first["ss_session_id"]
    made.folder = made.folder.with_name("another")
    assert build_metadata(facts(made, "cat", {}))["ss_session_id"] != first["ss_session_id"]


HELD = [one.key for one in catalogue().parameters if one.spec.holds not in ("", "lines")]


@pytest.mark.parametrize("key", HELD)
@pytest.mark.parametrize("given", ["John Doe/private/x.safetensors", "/home/John Doe/x.safetensors", "John\\x"])
def test_no_folder_of_a_path_is_in_the_job_of_a_file(key, given):
    """Of every parameter that names a file or folder; text encoders may be two."""
    name = base_names({key: given})[key]
    assert "John" not in name and name in ("x.safetensors", "x")
    if key == "te":
        two = base_names({key: f"{given}; {given}"})[key]
        assert "John" not in two and two == f"{name};{name}"
    said = build_metadata(dataclasses.replace(FileFacts(name="a"), job={key: given, "2nd pass": {key: given}}))
    assert "John" not in said["atelier_job"]
