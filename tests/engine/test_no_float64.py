"""Nothing of float64 reaches a device that has none: every mode, adapter type, stage and start, in short real runs."""

from __future__ import annotations

import engine_case
import no_float64
import pair_case
import pytest
import tiny
import torch
from no_float64 import DEVICE, refusing

from trainer.adapters.base import ADAPTERS
from trainer.engine import loop
from trainer.engine.catalogue import catalogue
from trainer.engine.devices import fingerprint
from trainer.engine.run import Request, run
from trainer.events import EventLog, Step
from trainer.maths.starts import smallest_directions
from trainer.maths.subspace import least_rows
from trainer.models.load import load_model
from trainer.modes.base import MODES
from trainer.optim.optimizers import OPTIMIZERS
from trainer.params.codec import load
from trainer.params.network import INITS
from trainer.stages.base import STAGES

pytestmark = pytest.mark.usefixtures("no_estimate")

BLOCKS = {"network_blocks(BASE = TextEncoder)": ["BASE", "M00"]}
ILECO = {
    "mode": "iLECO", "lora_data_directory": "", "original prompt": "red", "target prompt": "blue",
    "ileco_guidance": 1.0, "image_size(height, width)": 64,
}  # fmt: skip
PICTURES = {"mode": "LoRA", "original prompt": "", "original image": "", "target image": ""}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return pair_case.make(tmp_path_factory.mktemp("refusing"))


def train(case, marks, **changes):
    """A whole run on the device, two steps, with a preview; returns its losses."""
    settings = {
        "train_iterations": 2, "data_cache": "memory", "save_overwrite": True, "save_lora_name": "refusing",
        "train_state_every": 1, **BLOCKS,
    }  # fmt: skip
    trace = engine_case.Trace()
    given = engine_case.Case(case.root, case.model, case.pictures).settings(**{**settings, **changes})
    job = load(given, catalogue()).job
    assert run(Request(job, case.places, device=DEVICE), EventLog(trace)).reason == "done"
    assert marks.seen > 500
    return [event.loss for event in trace.events if isinstance(event, Step)]


def pairs(case, mode, **changes):
    return {**case.settings(mode=mode, train_batch_size=2), **BLOCKS, **changes}


def test_the_device_refuses_what_it_should():
    with refusing() as marks:
        on, off = torch.ones(3).to(DEVICE), torch.ones(3)
        assert on.device == DEVICE and (on * 2).device == DEVICE and off.double().device == no_float64.HOST
        weight = torch.nn.Linear(3, 3).to(DEVICE)
        weight(on).sum().backward()
        assert weight.weight.grad in marks and on.cpu() not in marks and on.cpu().double().sum() == 3
        for wrong in (
            lambda: on.double(), lambda: on.sum(dtype=torch.float64),
            lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
            lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE), lambda: off.double().to(on.device),
            lambda: torch.tensor([1.0], dtype=torch.float64, device=DEVICE), lambda: on.numpy(),
            lambda: torch.arange(4).double()[torch.tensor([1]).to(DEVICE)],
        ):  # fmt: skip
            with pytest.raises(TypeError, match="device"):
                wrong()


MODE_RUNS = {
    "LoRA": {"train_loss_weighting": "velocity", "sample_prompts": "a circle", "sample_every": 2, "sample_steps": 2},
    "iLECO": ILECO,
    "ADDifT": {},
    "Multi-ADDifT": {},
    "Difference": {},
    "Instant": {**{key: value for key, value in ILECO.items() if key != "ileco_guidance"}},
}


def test_every_mode_is_tried():
    assert set(MODE_RUNS) == set(MODES.names())


@pytest.mark.parametrize("mode", MODE_RUNS)
def test_every_mode_trains(case, mode):
    changes = dict(MODE_RUNS[mode])
    if mode in ("ADDifT", "Multi-ADDifT", "Difference"):
        changes = pairs(case, mode, **changes)
    with refusing() as marks:
        losses = train(case, marks, **{**changes, "mode": mode})
    assert all(torch.isfinite(torch.tensor(losses))) and len(losses) >= (0 if mode == "Instant" else 2)


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_type_trains(case, name):
    with refusing():
        model = load_model(case.model, device=DEVICE)
        blocks = {"network_blocks(BASE = TextEncoder)": ["BASE", "M00"]}
        job = engine_case.Case(case.root, case.model, case.pictures).job(
            **ILECO, **blocks, network_type=name, data_cache="memory", train_iterations=2, save_lora_name="type"
        )
        session = engine_case.session(case, job, model)
        try:
            for _ in range(2):
                assert torch.isfinite(loop.optimizer_step(session, None))
            with session.evaluating():
                assert session.network.export()
        finally:
            session.network.eject()


def test_words_train_with_two_encoders_and_sizes(tmp_path):
    tiny.folder("sdxl", tmp_path / "base")
    sdxl = engine_case.Case(tmp_path, tmp_path / "base", tmp_path)
    with refusing() as marks:
        blocks = {"network_train_text_encoder": True, "network_blocks(BASE = TextEncoder)": ["BASE", "M00"]}
        assert len(train(sdxl, marks, **{**ILECO, **blocks})) == 2


def test_decompositions_come_back_to_the_device():
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with refusing() as marks:
        on = weight.to(DEVICE)
        rows, factors = least_rows(on, 2), smallest_directions(on, 2, 0.5)
        assert rows in marks and all(factor in marks for factor in factors)
        torch.testing.assert_close(rows.cpu(), least_rows(weight, 2), rtol=0, atol=0)


STAGE_RUNS = {
    "start": {"network_init": "milora"},
    "instant": {**ILECO, "network_init": "instant"},
    "lalora": {"lalora_lambda": 1.0, "lalora_prompts": "a circle"},
    "prior": {"prior_loss_weight": 1.0, "prior_prompts": "a circle", "prior_states": 4},
    "abm": {"abm_enabled": True, "abm_steps": 2},
}
START_RUNS = {init: {"network_init": init} for init in INITS if init not in ("default", "instant", "milora")}


@pytest.mark.parametrize("changes", [*STAGE_RUNS.values(), *START_RUNS.values()], ids=[*STAGE_RUNS, *START_RUNS])
def test_every_stage_and_start_works(case, changes):
    with refusing() as marks:
        assert len(train(case, marks, **{**PICTURES, **changes})) == 2


def test_every_stage_is_tried():
    """Two belong to types that the test of the types runs: routing to experts, the null space to null."""
    assert {*STAGE_RUNS, "routing", "null space"} == set(STAGES.names())


def test_optimizers_and_half_precision(case):
    names = [name for name, traits in OPTIMIZERS.items() if not traits.needs_cuda]
    with refusing():
        model = load_model(case.model, device=DEVICE)
        plain = engine_case.Case(case.root, case.model, case.pictures)
        for name in names:
            rate = 1.0 if OPTIMIZERS.get(name).wants_lr_one else 1e-3
            changes = {
                "network_blocks(BASE = TextEncoder)": ["M00"], "data_cache": "memory", "train_iterations": 2,
                "train_optimizer": name, "train_learning_rate": rate, "train_lora_precision": "fp16",
                "save_overwrite": True,
            }  # fmt: skip
            job = plain.job(**{**ILECO, **changes})
            session = engine_case.session(case, job, model)
            try:
                for _ in range(2):
                    assert torch.isfinite(loop.optimizer_step(session, None)), name
            finally:
                session.network.eject()


def test_fingerprints_are_the_same_everywhere(case):
    """By bits: also for weights in another order of memory, and on a device without float64."""
    model = load_model(case.model)
    known = fingerprint(model.vae, *model.text_encoders)
    with refusing():
        assert fingerprint(*(part.to(DEVICE) for part in (model.vae, *model.text_encoders))) == known
    layer = next(module for module in model.text_encoders[0].modules() if isinstance(module, torch.nn.Linear))
    layer.weight.data = layer.weight.data.T.contiguous().T
    assert fingerprint(model.vae, *model.text_encoders) == known
    with torch.no_grad():
        layer.weight[-1, -1] += 1e-6
    assert fingerprint(model.vae, *model.text_encoders) != known
