"""Whole runs of the experimental adapters and stages: what they are told, that they resume, that their settings act."""
from __future__ import annotations

import re

import engine_case
import pytest
import torch
from safetensors.torch import load_file

from trainer.cli.main import main
from trainer.engine.control import Control
from trainer.events import Note, Step


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


def test_the_curvature_of_a_file_changes_loss_and_result_with_lambda(case, tmp_path) -> None:
    out = tmp_path / "context.safetensors"
    command = ["curvature", "--model", str(case.model), "--pictures", str(case.pictures), "--out", str(out), "--states",
               "6", "--labels", "data", "--json", "--output-dir", str(case.root / "out")]
    for key, value in (("image_size(height, width)", "64"), ("image_min_length", "64"), ("image_buckets_step", "64"),
                       ("train_model_precision", "fp32"), ("network_targets", "unet")):
        command += ["--set", f"{key}={value}"]
    assert main(command) == 0
    context = load_file(out)
    layer = next(name.rpartition(".")[0] for name in context if name.endswith("attn2_to_k.curvature_out"))
    assert all(value.isfinite().all() for value in context.values()) and context[f"{layer}.curvature_out"].sum() > 0

    def weighted(tensors):
        total = 0.0
        for name in (name for name in tensors if name.endswith("lora_down.weight")):
            key = name.removesuffix(".lora_down.weight")
            delta = tensors[f"{key}.lora_up.weight"].flatten(1) @ tensors[name].flatten(1) * (2 / 4)
            total += float((context[f"{key}.curvature_out"][:, None] * context[f"{key}.curvature_in"] * delta**2).sum())
        return total

    found = []
    for strength in (0.0, 1.0, 100.0):
        own = {"lalora_lambda": strength, **({"lalora_context_path": str(out)} if strength else {})}
        tensors, trace = trained(case, f"lalora_{strength:g}", train_iterations=6, train_learning_rate=0.01, **own)
        found.append((weighted(tensors), trace.losses))
        assert ("has the curvature of" in told(trace)) == bool(strength)
    (free, plain), (held, with_one), (tight, with_many) = found
    assert plain[1] == with_one[1] == with_many[1]  # nothing is learned yet
    assert plain[6] != with_one[6] != with_many[6]
    assert tight < held < free and tight < 0.5 * free


def test_without_a_file_the_curvature_is_measured_and_a_resumed_run_goes_on_alike(case) -> None:
    own = {"lalora_lambda": 5.0, "lalora_prompts": "a red circle", "train_learning_rate": 0.01, "train_iterations": 4}
    own |= {"train_state_every": 2, "network_targets": "unet", "network_type": "experts", "network_routing": "input"}
    whole = engine_case.Trace()
    case.run(whole, save_lora_name="measured", **own)
    assert "was measured on drawings of 1 prompts" in told(whole)
    control, half = Control(), engine_case.Trace()

    def stop(event):
        if isinstance(event, Step) and event.step >= 2:
            control.stop()

    result = case.run(half, stop, control=control, save_lora_name="half", **own)
    rest = engine_case.Trace()
    done = case.run(rest, resume=result.folder, save_lora_name="half", **own)
    assert done.reason == "done" and rest.losses
    assert {**half.losses, **rest.losses} == whole.losses


def test_abm_reports_the_signs_and_moves_the_start(case) -> None:
    own = {"train_iterations": 1, "train_learning_rate": 1e-9}
    plain, _ = trained(case, "abm_off", **own)
    own |= {"abm_enabled": True, "abm_steps": 30, "abm_lr": 1e-3, "abm_batch_size": 3, "abm_weight_strategy": "linear"}
    started, trace = trained(case, "abm_on", **own)
    assert max(float(value.abs().max()) for name, value in plain.items() if "lora_up" in name) < 1e-6
    assert max(float(value.abs().max()) for name, value in started.items() if "lora_up" in name) > 1e-4
    before, after = (float(found) for found in re.findall(r"([\d.]+)% ", told(trace).split("ABM: ")[1])[:2])
    assert 50 < before < 100 and after > before
