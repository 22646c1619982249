"""Modes × families × adapter types: whole short runs, so that every two of the three meet at least once."""

from __future__ import annotations

import os

import engine_case
import pair_case
import pytest

from trainer.adapters.base import ADAPTERS
from trainer.adapters.file import read_lora
from trainer.engine import preflight
from trainer.engine.run import Request, run
from trainer.events import EventLog
from trainer.models.load import load_model
from trainer.modes.base import MODES

pytestmark = pytest.mark.usefixtures("no_estimate")

FAMILIES = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
TRAINING = [name for name in MODES.names() if MODES.get(name).steps and name != "LoRA"]
WORDS = {"original prompt": "red", "target prompt": "blue"}
SHORT = {
    "train_iterations": 1, "train_batch_size": 1, "train_lr_scheduler": "constant", "save_overwrite": True,
    "data_cache": "memory", "network_blocks(BASE = TextEncoder)": ["M00"],
}  # fmt: skip


def combinations():
    """Every mode with every type, the families in turn; with ATELIER_EVERY all three of them each time."""
    for row, kind in enumerate(ADAPTERS.names()):
        for column, mode in enumerate(TRAINING):
            turn = (row + column) % len(FAMILIES)
            for place, family in enumerate(FAMILIES):
                if place == turn or os.environ.get("ATELIER_EVERY"):
                    yield family, mode, kind


def test_every_two_meet():
    found = list(combinations())
    assert {(mode, kind) for _, mode, kind in found} == {(m, k) for m in TRAINING for k in ADAPTERS.names()}
    assert {(family, kind) for family, _, kind in found} == {(f, k) for f in FAMILIES for k in ADAPTERS.names()}
    assert {(family, mode) for family, mode, _ in found} == {(f, m) for f in FAMILIES for m in TRAINING}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """(case, loaded model, sum of its weights) by family, each made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            case = pair_case.make(tmp_path_factory.mktemp(family), family, FAMILIES[family])
            model = load_model(case.model)
            made[family] = case, model, total(model)
        return made[family]

    return get


def total(model):
    return sum(float(tensor.double().sum()) for tensor in model.unet.state_dict().values())


@pytest.mark.parametrize(("family", "mode", "kind"), list(combinations()))
def test_it_starts_steps_and_writes(families, family, mode, kind):
    case, model, before = families(family)
    changes = {**SHORT, "mode": mode, "network_type": kind, "save_lora_name": f"{mode} {kind}"}
    if mode == "iLECO":
        case = engine_case.Case(case.root, case.model, case.pictures)
        changes |= {**WORDS, "lora_data_directory": ""}
    losses = []
    result = run(
        Request(case.job(**changes), case.places, model=model),
        EventLog(lambda event: losses.append(event.loss) if hasattr(event, "loss_ema") else None),
    )
    assert len(losses) == len(MODES.get(mode).passes())
    assert all(0 < loss < 100 for loss in losses)
    tensors, _ = read_lora(result.path)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert any(bool(tensor.any()) for key, tensor in tensors.items() if not key.endswith(".alpha"))
    assert total(model) == before and not any("forward" in vars(module) for module in model.unet.modules())


@pytest.mark.parametrize("mode", ["ADDifT", "Difference"])
def test_long_prompts_are_told_without_a_model(tmp_path, mode):
    """The tokenizer beside the model's file is enough, also for the prompts of a pair."""
    case = pair_case.make(tmp_path)
    job = case.job(**{"mode": mode, "original prompt": "y" * 90, "target prompt": "x" * 75})
    (line,) = preflight.long_prompts(job, case.places, None)
    assert "90 tokens" in line and "parts of 75" in line
