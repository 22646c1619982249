"""Every mode with every adapter type and every family: what is composed freely is tried in all combinations."""

from __future__ import annotations

import os
import time

import engine_case
import pair_case
import pytest
import tiny
import torch
from ldm_names import checkpoint

from trainer.adapters.base import ADAPTERS
from trainer.adapters.file import read_lora
from trainer.data.cache import TensorCache
from trainer.engine import loop
from trainer.engine.catalogue import catalogue
from trainer.engine.passes import Passes, plan_passes
from trainer.engine.preflight import check_before_loading
from trainer.engine.process import Process
from trainer.engine.run import Request, run
from trainer.engine.site import Site
from trainer.events import EventLog, Note
from trainer.models.load import load_model
from trainer.params.codec import load

pytestmark = pytest.mark.usefixtures("no_estimate")

ILECO = {
    "mode": "iLECO", "lora_data_directory": "", "original prompt": "red", "target prompt": "blue",
    "data_cache": "memory",
}  # fmt: skip
FEW = {"network_blocks(BASE = TextEncoder)": ["M00", "OUT00"]}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return pair_case.make(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def model(case):
    return load_model(case.model)


def moved(session):
    """Give the adapter a small random ΔW, so that no gradient is zero for its start's sake."""
    stream = torch.Generator().manual_seed(7)
    for flat in session.flat.values:
        flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_type_learns_from_words(case, model, name):
    """The gradient of iLECO's loss is a descent direction: a small step along it lowers the loss by what it says."""
    job = engine_case.Case(case.root, case.model, case.pictures).job(**ILECO, **FEW, network_type=name)
    session = engine_case.session(case, job, model)
    try:
        moved(session)
        before = float(loop.gradients(session, 0))
        slope = sum(float(gradient.double().square().sum()) for gradient in session.flat.gradients)
        assert slope > 0
        step = 0.01 * before / slope
        with torch.no_grad():
            for value, gradient in zip(session.flat.values, session.flat.gradients, strict=True):
                value.sub_(gradient * step)
        after = float(loop.gradients(session, 0))
        assert after == pytest.approx(before * 0.99, rel=4e-3)
    finally:
        session.network.eject()


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_type_can_be_both_passes_of_difference(case, model, name):
    """The second adapter learns on top of the frozen first one, and only it."""
    changes = {"mode": "Difference", "network_type": name, "train_iterations": 1, **FEW}
    job = case.job(**changes)
    folder = case.root / f"run {name}"
    folder.mkdir()
    where = Site(case.places, Process(), EventLog(), folder, TensorCache(None))
    plans = plan_passes(job)
    passes = Passes(plans, model, where, check_before_loading(job, case.places), drawn=False)
    try:
        first = passes.begin(plans[0], resumed=False)
        loss = float(loop.gradients(first, 0))
        moved(first)
        passes.settle(plans[0], first, trained=False)
        second = passes.begin(plans[1], resumed=False)
        on_top = float(loop.gradients(second, 0))
        assert not any(parameter.requires_grad for parameter in first.network.parameters())
        assert all(bool(gradient.any()) for gradient in second.flat.gradients)
        with first.network.at_strength(0.0):
            alone = float(loop.gradients(second, 0))
        assert abs(on_top - alone) > 1e-5 * loss
    finally:
        passes.close()


@pytest.mark.parametrize(("kind", "prediction"), [("sd2", "v_prediction"), ("sdxl", "epsilon")])
def test_words_with_every_family(tmp_path, kind, prediction):
    """iLECO on SD2 (v) and SDXL (two encoders, pooled text, sizes): preflight, losses, CSV, stop and resume, file."""
    tiny.folder(kind, tmp_path / "base", prediction=prediction)
    case = engine_case.Case(tmp_path, tmp_path / "base", tmp_path)
    checked = case.run(dry=True, **ILECO, save_lora_name="dry")
    assert checked.reason == "checked" and checked.report["prediction"] == prediction
    assert checked.report["pairs of prompts"] == ["'red' → 'blue'"]
    blocks = {"network_train_text_encoder": True, "network_blocks(BASE = TextEncoder)": ["BASE", "M00", "OUT01"]}
    resumed, whole = engine_case.stopped_and_resumed(case, kind, **ILECO, **blocks)
    assert resumed == whole and len(whole) == 9 and all(loss > 0 for loss in whole.values())
    tensors, _ = read_lora(case.places.loras / f"{kind}-parts.safetensors")
    prefixes = {key.split("_")[1] for key in tensors}
    assert prefixes == ({"unet", "te1", "te2"} if kind == "sdxl" else {"unet", "te"})


@pytest.mark.skipif(not os.environ.get("ATELIER_FULL_SIZE"), reason="ATELIER_FULL_SIZE=1 runs it: 5 GB of memory")
def test_an_instant_map_of_a_full_size_model_takes_seconds(tmp_path, capsys):
    """SD 1.5's text encoder and cross-attention with random weights, one concept, the built-in preserve list."""
    torch.manual_seed(0)
    real = ("cond_stage_model", "attn2.to_k", "attn2.to_v")
    tensors = {
        name: torch.randn(shape.shape) * 0.02 if any(part in name for part in real) else torch.empty(shape.shape)
        for name, shape in checkpoint(tiny.FULL["sd1"], None).items()
    }
    model = tiny.model("sd1", tensors=tensors)
    given = {"format": 1, "mode": "Instant", "model": "full", "original prompt": "a cat", "target prompt": "a dog",
             "train_model_precision": "fp32", "save_lora_name": "full", "data_cache": "memory"}  # fmt: skip
    trace = engine_case.Trace()
    places = engine_case.Case(tmp_path, tmp_path, tmp_path).places
    began = time.process_time()
    run(Request(load(given, catalogue()).job, places, model=model), EventLog(trace))
    seconds = time.process_time() - began  # of all threads: two free cores take no longer
    (told,) = [event.text for event in trace.events if isinstance(event, Note) and "embeddings edited" in event.text]
    (whole,) = [event.text for event in trace.events if isinstance(event, Note) and "The run took" in event.text]
    with capsys.disabled():
        print(f"\n{told}\n{whole}\n{seconds:.1f} CPU seconds")
    assert seconds < 20 and "32 layers" in told
