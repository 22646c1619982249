"""Where a lent model is computed with, and that the stand-ins of the WebUIs are named as the real ones are."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import children
import pytest
import torch
from hosts_case import Told, addresses, job, parameters, starter
from hosts_fakes import FAKES, Fake
from safetensors.torch import load_file, save_file

from trainer.hosts import a1111

KEYS = json.loads((children.TESTS / "support" / "hosts_keys.json").read_text(encoding="utf-8"))
"""WebUI → family → part → names of the tensors in the real one, numbers as N, with precision, dimensions and count; and
whether they are inference tensors. Dumped on a CPU from reForge 3b56b268, Forge dfdcbab6, Neo 2.26 and AUTOMATIC1111
1.10.1.
"""
CASES = [(kind, family) for kind, found in KEYS.items() if kind in FAKES for family in found]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    return starter(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", list(FAKES))
def test_it_is_computed_with_on_the_device_that_the_webui_draws_on(kind, make, monkeypatch) -> None:
    device = "cuda:1"
    fake, host = make(kind, dtype=torch.float16)
    fake.set_device(device)
    monkeypatch.setattr(a1111, "_device", lambda model: torch.device(device))
    told = Told()
    with host.borrow(host.resolve(job(train_VAE_precision="model")), told.log) as model:
        assert model is not None, told.lines
        assert model.device == torch.device(device) == host.device()
        assert model.compute == torch.float16, "as on a CPU, where half precision is slow"
        assert f"on {device}." in told and "draws on" not in told
        # What is not in use yet rests in memory, in the WebUI's own storage.
        assert {p.device.type for p in parameters(model)} == {"cpu"}
        assert addresses(parameters(model)) <= addresses(fake.live().values())
        assert fake.calls == ["to memory"]
        del model
    assert fake.calls == (["to memory", "to device"] if kind == "a1111" else ["to memory"])


def test_another_device_than_the_webuis_is_reported(make, monkeypatch) -> None:
    _, host = make("forge")
    places = iter([torch.device("cpu"), torch.device("cuda")])
    monkeypatch.setattr(host, "device", lambda: next(places))
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model.device.type == "cpu"
        assert "generates on cuda, but this training computes on cpu" in told


def test_a_webui_that_cannot_be_asked_gets_the_best_device(make, monkeypatch) -> None:
    fake, host = make("neo")
    monkeypatch.setattr(host, "draws_on", lambda: fake.no_such_thing)
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert host.device() is None and model is not None, told.lines
        assert "draws on" not in told


# -------------------------------------------------------------------- names


def patterns(tensors: object) -> set[str]:
    return {re.sub(r"\d+", "N", name) for name in tensors}


def parts_of(fake: Fake) -> dict[str, dict[str, torch.Tensor]]:
    if fake.kind == "a1111":
        return {"all": fake.data.sd_model.state_dict()}
    objects = fake.objects
    parts = {"unet": objects.unet.model, "clip": objects.clip.cond_stage_model, "vae": objects.vae.first_stage_model}
    return {name: module.state_dict() for name, module in parts.items()}


# Of the sampler and the schedule, not of the parts that are trained.
BESIDE = re.compile(r"^(model_sampling|noise_augmentor|predictor|denoiser)\.|^\w+$")


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_the_stand_ins_have_the_names_of_the_real_webuis(kind, family, make) -> None:
    fake, _ = make(kind, family)
    for part, tensors in parts_of(fake).items():
        real = {name for name in KEYS[kind][family][part] if not BESIDE.match(name)}
        mine = patterns(tensors)
        # All widths of the dumped checkpoints are equal, so that one side of the UNet needs no skip connections.
        kinder = {name for name in mine - real if "input_blocks.N.N.skip_connection" not in name}
        assert (kinder, real - mine) == (set(), set())
    inference = any(tensor.is_inference() for tensor in fake.live().values())
    assert inference == KEYS[kind][family]["inference"]


# -------------------------------------------------------------------- reForge's text encoders


def test_reforge_trains_the_text_encoders_it_draws_with(make, tmp_path) -> None:
    fake, host = make("reforge", "sdxl")
    assert "te" not in host.resolve(job()).to_dict()  # the checkpoint's own, though read as a file of their own
    other = tmp_path / "models" / "Stable-diffusion" / "lender.safetensors"
    tensors = load_file(fake.checkpoint)
    save_file({name: t + 0.25 if t.is_floating_point() else t for name, t in tensors.items()}, other)
    fake.lend_texts(other)
    with torch.no_grad():
        for parameter in fake.objects.clip.cond_stage_model.parameters():
            parameter.add_(0.25)
    wanted, told = host.resolve(job()), Told()
    assert wanted.to_dict()["te"] == str(other)
    with host.borrow(wanted, told.log) as model:
        assert model is not None, told.lines
        assert addresses(parameters(model)) <= addresses(fake.live().values())
        projection = tensors["conditioner.embedders.1.model.text_projection"].T + 0.25
        assert torch.equal(model.text_encoders[1].projection.weight, projection)
        del model
    fake.modules["modules.sd_text_encoder"].current_text_encoder = types.SimpleNamespace(clip_model=None)
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "no longer knows which" in told


def test_a_part_that_is_missing_is_read_from_the_file_and_said(make) -> None:
    fake, host = make("reforge", "sdxl")
    del fake.objects.clip.cond_stage_model.clip_g.text_projection
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "text_projection" in told and "read from its file" in told
