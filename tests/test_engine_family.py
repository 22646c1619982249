"""Whole runs of the experimental adapters and stages: what they are told, that they resume, that their settings act."""
from __future__ import annotations

import engine_case
import pytest
import torch
from safetensors.torch import load_file

from trainer.events import Note


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("family"))


def told(trace) -> str:
    return "\n".join(event.text for event in trace.events if isinstance(event, Note))


def trained(case, name, **changes):
    """(the tensors of the file, the events) of a short run without the text encoder."""
    trace = engine_case.Trace()
    result = case.run(trace, save_lora_name=name, **{"train_iterations": 3, "network_targets": "unet", **changes})
    return load_file(result.path), trace


def test_null_in_the_null_space_of_activations(case) -> None:
    own = {"network_type": "null", "network_null_prompts": "a red circle\na blue square"}
    weights, _ = trained(case, "null_w", **own)
    tensors, trace = trained(case, "null_a", **own, network_null_space="activations")
    assert "The inputs of" in told(trace) and "2 ordinary prompts" in told(trace)
    downs = [name for name in tensors if name.endswith("to_k.lora_down.weight")]
    assert any(not torch.equal(tensors[name], weights[name]) for name in downs)
    for name in downs:
        rows = tensors[name][:2] / tensors[name][:2].norm(dim=1, keepdim=True)
        torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=0, atol=1e-3)
