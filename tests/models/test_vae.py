"""Another VAE: a file or a diffusers folder, and warnings of one that was made for another family."""

from __future__ import annotations

import json
import shutil

import engine_case
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trainer.data.cache import TensorCache
from trainer.engine.passes import Passes, plan_passes
from trainer.engine.preflight import resolve_model
from trainer.engine.process import Process
from trainer.engine.site import Site
from trainer.errors import JobError
from trainer.events import EventLog
from trainer.models.load import load_model
from trainer.models.noise import zero_terminal_snr

pytestmark = pytest.mark.usefixtures("no_estimate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vae")
    tiny.folder("sdxl", root / "base")
    return root


def vae(folder, name, change):
    """A copy of the model's VAE folder with changed weights and configuration."""
    target = folder / name
    shutil.copytree(folder / "base" / "vae", target)
    (weights,) = target.glob("*.safetensors")
    tensors, config = load_file(weights), json.loads((target / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, weights)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_folder_is_taken_by_path_and_by_name(folder):
    target = vae(folder, "tuned", lambda tensors, config: None)
    assert resolve_model(str(target), folder, "vae") == target
    assert resolve_model("tuned", folder, "vae") == folder / "tuned"
    assert resolve_model("base", folder, "vae") == folder / "base"  # of a whole model, its VAE
    with pytest.raises(JobError, match="no such VAE file or folder"):
        resolve_model("absent", folder, "vae")
    model = load_model(folder / "base", vae_path=target)
    assert model.vae is not None and not model.warnings


def test_a_stranger_is_warned_of_and_a_relative_is_not(folder):
    """One tuned from it, its weights scaled and moved, passes; random ones of the same shapes do not."""

    def tuned(tensors, config):
        for name in tensors:
            tensors[name] = tensors[name] * 0.5 + 0.1 * torch.randn_like(tensors[name]) * tensors[name].std()

    def strange(tensors, config):
        for name in tensors:
            tensors[name] = torch.randn_like(tensors[name])

    assert not load_model(folder / "base", vae_path=vae(folder, "relative", tuned)).warnings
    (told,) = load_model(folder / "base", vae_path=vae(folder, "stranger", strange)).warnings
    assert "stranger has nothing in common" in told and "SD 1 and SDXL" in told


def test_a_folder_that_says_another_scale_is_warned_of(folder):
    target = vae(folder, "sd1", lambda tensors, config: config.update(scaling_factor=0.18215))
    (told,) = load_model(folder / "base", vae_path=target).warnings
    assert "0.18215" in told and "0.13025" in told


@pytest.mark.parametrize("v_pred", [True, False])
def test_zero_terminal_snr_for_the_time_of_a_run(folder, v_pred):
    """The schedule ends in pure noise, and is what it was afterwards; with ε it is warned of."""
    case = engine_case.make(folder / str(v_pred))
    model = load_model(case.model, v_pred=v_pred)
    before, told = model.process, []
    log = EventLog(lambda event: told.append(getattr(event, "text", "")))
    site = Site(case.places, Process(), log, case.root / "run", TensorCache(None))
    passes = Passes(plan_passes(case.job(model_zero_terminal_snr=True)), model, site, None, False)
    expected = zero_terminal_snr(before.alphas_cumprod_T)
    assert torch.equal(model.process.alphas_cumprod_T, expected) and model.process.zero_snr and not before.zero_snr
    assert any("pure noise gives away" in line for line in told) != v_pred
    passes.close()
    assert model.process is before
