"""Every shipped preset of an adapter type or a start runs on a tiny model: its file has the type's tensors and moves
every layer it names.
"""

from __future__ import annotations

import json
from pathlib import Path

import engine_case
import pytest
import torch

from trainer.adapters.base import ADAPTERS
from trainer.adapters.file import read_lora
from trainer.events import Note

SHIPPED = Path(__file__).resolve().parents[2] / "presets"
SMALL = {
    "image_size(height, width)": 64, "image_min_length": 64, "image_buckets_step": 64, "train_iterations": 2,
    "train_learning_rate": 0.01, "train_model_precision": "fp32", "save_precision": "fp32", "train_seed": 3,
}  # fmt: skip
FAMILY = {  # what each says at its start, with less of it to do
    "Null": ("", {}),
    "NullActivations": ("ordinary prompts", {"network_null_prompts": "a red circle"}),
    "Universal": ("", {}),
    "EffiLoRA": ("", {}),
    "LaLoRA": ("curvature", {"lalora_prompts": "a red circle"}),
    "ABM": ("ABM: ", {"abm_steps": 2}),
}
ESTIMATED = ("LoRA_DoRA",)
CONSTANT = ("alpha", "on_input", "lokr_w1")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> engine_case.Case:
    return engine_case.make(tmp_path_factory.mktemp("case"))


def test_no_preset_of_a_type_is_left_out() -> None:
    shipped = {path.stem for path in SHIPPED.glob("*.json")}
    types = {json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8")).get("network_type") for name in shipped}
    assert types - {None} == {name for name, _ in ADAPTERS.items()}
    others = {name for name in shipped if not name.startswith(("LoRA", "ADDifT", "Difference"))}
    assert others - set(FAMILY) == {"Instant", "iLECO", "iLECO_Instant", "demo"}


@pytest.mark.parametrize("name", [*sorted(path.stem for path in SHIPPED.glob("LoRA*.json")), *FAMILY])
def test_a_preset_of_a_type_runs(case: engine_case.Case, name: str, request) -> None:
    if name not in ESTIMATED:  # seconds each on fake tensors
        request.getfixturevalue("no_estimate")
    preset = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    says, changes = FAMILY.get(name, ("", {}))
    trace = engine_case.Trace()
    own = {**preset, **SMALL, **changes, "save_lora_name": name, "logging_save_csv": False}
    result = case.run(trace, **own)
    assert any(says in event.text for event in trace.events if isinstance(event, Note))
    tensors, metadata = read_lora(result.path)
    kind = ADAPTERS.get(preset["network_type"])
    assert {key.partition(".")[2] for key in tensors} <= set(kind.file_tensors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    moved = {key.partition(".")[0] for key, t in tensors.items() if not key.endswith(CONSTANT) and t.abs().sum() > 0}
    assert moved == {key.partition(".")[0] for key in tensors}
    assert metadata["ss_network_module"] == kind.network_module
