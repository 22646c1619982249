"""Numbers on a card against the CPU's and float32; what needs no card is looked at on the CPU too."""

from __future__ import annotations

import engine_case
import gpu_case
import pair_case
import pytest
import torch
from gpu_case import CUDA, DEVICES, ILECO, loaded, moved, session

from trainer.adapters.base import ADAPTERS
from trainer.engine import loop
from trainer.engine.devices import fingerprint
from trainer.engine.flat import FlatParameters
from trainer.engine.samples import SampleSettings, sample
from trainer.maths import scaling
from trainer.maths.scaling import LossScaler
from trainer.models.load import load_model
from trainer.places import BASE_MODEL

pytestmark = pytest.mark.usefixtures("no_estimate")

OTHERS = [{"use_dora": True}, {"network_type": "c3lier", "network_tucker": True}, {"network_timestep_rank": 2}]
TYPES = [*({"network_type": name} for name in ADAPTERS.names()), *OTHERS]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return pair_case.make(tmp_path_factory.mktemp("numbers"))


def plain(case):
    return engine_case.Case(case.root, case.model, case.pictures)


def gradient(case, device, precision, **changes):
    """The gradient of iLECO's loss in the moved adapter, float32 on the CPU."""
    made = session(plain(case), loaded(case, device, precision), **ILECO, **changes)
    try:
        moved(made)
        loop.gradients(made, 0)
        return torch.cat([flat.float().cpu() for flat in made.flat.gradients])
    finally:
        made.network.eject()


def cosine(one, two):
    return float(torch.nn.functional.cosine_similarity(one, two, 0))


def names(changes):
    return "-".join(str(value) for value in changes.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", TYPES, ids=names)
def test_half_precision_points_where_float32_does(case, monkeypatch, device, changes):
    monkeypatch.setattr(scaling, "START", 2.0**10)
    if device.type == "cpu" and changes.get("network_type") not in ("lierla", "loha", "oft"):
        pytest.skip("on a CPU three types are enough")
    exact = gradient(case, device, "fp32", **changes)
    for precision, least in (("fp16", 0.999), ("bf16", 0.99)):
        half = gradient(case, device, precision, **changes)
        assert bool(half.isfinite().all()) and cosine(half, exact) > least, precision


@pytest.mark.gpu
@pytest.mark.parametrize("changes", TYPES, ids=names)
def test_float32_on_the_card_is_that_of_the_cpu(case, changes):
    """With TF32 off, as outside of a run."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        here, there = gradient(case, CUDA, "fp32", **changes), gradient(case, torch.device("cpu"), "fp32", **changes)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert (here - there).norm() < 1e-3 * there.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_changes_no_gradient(case, device):
    found = [gradient(case, device, "fp32", use_gradient_checkpointing=on) for on in (False, True)]
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


@pytest.mark.parametrize("device", DEVICES)
def test_weights_kept_in_fp8_point_where_float32_does(case, device):
    """Storage only: every layer casts as it computes. On the trained demo model: a random one magnifies everything."""
    demo = engine_case.Case(case.root, BASE_MODEL, case.pictures)
    model = load_model(demo.model, device=device)
    model.set_precision(storage=torch.float8_e4m3fn, compute=torch.float32)
    assert {p.element_size() for p in model.unet.parameters()} == {1}
    made = session(demo, model, **ILECO)
    try:
        moved(made)
        loop.gradients(made, 0)
        stored = torch.cat([flat.cpu() for flat in made.flat.gradients])
    finally:
        made.network.eject()
    assert cosine(stored, gradient(demo, device, "fp32")) > 0.98


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_the_scaler_is_that_of_torch(device, fused):
    sides = []
    for ours in (True, False):
        module = torch.nn.Linear(4, 4, bias=False, device=device)
        with torch.no_grad():
            module.weight.fill_(1.0)
        flat = FlatParameters(module)
        optimizer = torch.optim.AdamW(flat.trained, lr=0.1, **({"fused": True} if fused else {}))
        scaler = LossScaler(flat.gradients, True) if ours else torch.amp.GradScaler(device.type)
        seen = []
        for step in range(8):
            flat.zero_gradients()
            scaler.scale(module(torch.full((1, 4), 1.0 + step, device=device)).sum()).backward()
            if step in (1, 2, 6):
                flat.gradients[0][3] = torch.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), module.weight.flatten().tolist()))
        sides.append(seen)
    assert sides[0] == sides[1] and sides[0][-1][0] == 2.0**13


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_fingerprints_are_those_of_the_cpu(case, kind):
    model = load_model(case.model, storage=gpu_case.DTYPES[kind])
    known = [fingerprint(model.unet), fingerprint(*model.text_encoders), fingerprint(model.vae)]
    parts = [part.to(CUDA) for part in (model.unet, *model.text_encoders, model.vae)]
    assert [fingerprint(parts[0]), fingerprint(*parts[1:-1]), fingerprint(parts[-1])] == known


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_pictures_are_those_of_the_cpu(case, sampler):
    settings = SampleSettings((64, 64), steps=4, sampler=sampler)
    drawn = [sample(load_model(case.model, device=device), ["a circle"], settings) for device in ("cpu", CUDA)]
    assert float((drawn[0] - drawn[1]).abs().mean()) < 2 / 127.5
    half = load_model(case.model, device=CUDA)
    half.set_precision(vae=torch.float16)
    assert float((drawn[1] - sample(half, ["a circle"], settings)).abs().mean()) < 2 / 127.5
