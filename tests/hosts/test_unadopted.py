"""Models of WebUIs that cannot be adopted: read from their files, said, and left as they were."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from hosts_case import Told, digest, job, starter
from hosts_fakes import FAKES, LORA, Fake
from torch import Tensor

from trainer.errors import NotAdoptable
from trainer.events import EventLog
from trainer.models.live import Live, adopt


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    return starter(tmp_path, monkeypatch)


def touch(tensor: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.add_(LORA)


def in_eight_bits(fake: Fake) -> None:
    layer = next(m for m in unet_of(fake).modules() if "weight" in m._parameters)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def half_elsewhere(fake: Fake) -> None:
    layer = next(m for m in unet_of(fake).modules() if "weight" in m._parameters)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)


def patched(fake: Fake) -> None:
    touch(next(m for m in unet_of(fake).modules() if "weight" in m._parameters).weight)


def file_gone(fake: Fake) -> None:
    fake.checkpoint.write_bytes(b"not a model")


def unet_of(fake: Fake) -> torch.nn.Module:
    return fake.data.sd_model.model.diffusion_model if fake.kind == "a1111" else fake.objects.unet.model


@pytest.mark.parametrize("kind", list(FAKES))
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (in_eight_bits, "quantised"),
        (half_elsewhere, "not in memory"),
        (patched, "changed its weights"),
        (file_gone, "cannot be read to compare"),
    ],
)
def test_what_cannot_be_adopted_is_read_from_its_file_and_said(kind, harm, said, make) -> None:
    fake, host = make(kind)
    harm(fake)
    before, told = digest({n: t for n, t in fake.live().items() if not t.is_meta}), Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None
        assert said in told and "read from its file" in told
        assert kind == "a1111" or "to memory" in fake.calls
    assert digest({n: t for n, t in fake.live().items() if not t.is_meta}) == before
    assert not fake.lock.held


def test_forges_own_reasons_to_read_the_file(make) -> None:
    fake, host = make("forge")
    fake.objects.unet.object_patches["diffusion_model.out"] = object()
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "replaced parts" in told


def test_a1111s_own_reasons_to_read_the_file(make) -> None:
    fake, host = make("a1111")
    fake.modules["modules.sd_unet"].current_unet = object()
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "TensorRT" in told


@pytest.mark.parametrize("kind", list(FAKES))
def test_a_webui_that_is_not_as_we_know_it_still_trains_from_the_file(kind, make, monkeypatch) -> None:
    _, host = make(kind)
    monkeypatch.setattr(type(host), "lay_bare", lambda self, restore: restore.no_such_thing())
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "AttributeError" in told


@pytest.mark.parametrize("kind", list(FAKES))
def test_another_model_is_read_from_its_file_with_the_loaded_one_out_of_the_way(kind, make) -> None:
    fake, host = make(kind)
    told = Told()
    with host.borrow(host.resolve(job(model="other.safetensors")), told.log) as model:
        assert model is None and "other.safetensors is not loaded" in told
        assert kind == "a1111" or fake.calls == ["to memory"]


def test_models_kept_beside_the_loaded_one_leave_the_device_meanwhile(make) -> None:
    fake, host = make("a1111")
    kept = types.SimpleNamespace(lowvram=False, parameters=lambda: iter([torch.empty(0, device="meta")]))
    fake.data.loaded_sd_models.append(kept)
    with pytest.raises(ZeroDivisionError), host.borrow(host.resolve(job()), EventLog()) as model:
        assert model is not None and fake.calls == ["to memory"]
        raise ZeroDivisionError
    assert fake.calls == ["to memory", "to device"]


def test_forge_adopts_only_what_the_next_picture_would_be_drawn_with(make) -> None:
    fake, host = make("forge")
    fake.data.forge_loading_parameters["checkpoint_info"] = fake.infos[1]  # selected since, not loaded yet
    assert host.loaded_model() == "other.safetensors"
    assert Path(host.resolve(job()).to_dict()["model"]) == fake.other
    fake.data.sd_model = types.SimpleNamespace()  # the stand-in before the first picture
    told = Told()
    with host.borrow(host.resolve(job(model="loaded")), told.log) as model:
        assert model is None and "is not loaded in Forge" in told


def test_tensors_that_are_packed_are_refused(tmp_path) -> None:
    class Packed(Tensor):
        pass

    packed = torch.zeros(2).as_subclass(Packed)
    with pytest.raises(NotAdoptable, match="packed"):
        adopt(Live(tmp_path / "x.safetensors", {"model.diffusion_model.a.weight": packed}))
