"""Whole runs of the experimental adapters and stages: what they are told, that they resume, that their settings act."""

from __future__ import annotations

import re

import engine_case
import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters.file import read_lora
from trainer.cli.main import main
from trainer.engine import loop
from trainer.engine.catalogue import catalogue
from trainer.engine.control import Control
from trainer.events import Note, Step
from trainer.models.load import load_model
from trainer.params.codec import load

pytestmark = pytest.mark.usefixtures("no_estimate")


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


def test_the_curvature_of_a_file_changes_loss_and_result_with_lambda(case, tmp_path, capsys) -> None:
    out = tmp_path / "context.safetensors"
    command = [
        "curvature",
        "--model",
        str(case.model),
        "--pictures",
        str(case.pictures),
        "--out",
        str(out),
        "--states",
        "6",
        "--labels",
        "data",
        "--json",
        "--output-dir",
        str(case.root / "out"),
    ]
    for key, value in (
        ("image_size(height, width)", "64"),
        ("image_min_length", "64"),
        ("image_buckets_step", "64"),
        ("train_model_precision", "fp32"),
        ("network_targets", "unet"),
    ):
        command += ["--set", f"{key}={value}"]
    for flag, wrong, why in (
        ("--prompts", "none.txt", "'none.txt': cannot be read"),
        ("--states", "0", "at least 1 state"),
        ("--out", "a.bin", "must end in .safetensors"),
    ):
        assert main([*command, flag, wrong]) == 1 and why in capsys.readouterr().err
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
    assert "was measured on samples of 1 prompts" in told(whole)
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


ABM = {"abm_enabled": True, "abm_steps": 3, "abm_lr": 1e-3}
NULL = {"network_type": "null", "network_null_space": "activations", "network_null_prompts": "a red circle"}
LALORA = {"lalora_lambda": 1.0, "lalora_prompts": "a red circle"}
PRIOR = {"prior_loss_weight": 1.0, "prior_prompts": "a red circle", "prior_states": 8}
EXPERTS = {"network_type": "experts", "network_routing": "input"}
OPTIONS = [
    *((ABM, change) for change in (
        {"abm_enabled": False}, {"abm_steps": 2}, {"abm_lr": 1e-2}, {"abm_margin": 2.0}, {"abm_batch_size": 1},
        {"abm_weight_strategy": "quadratic"})),
    *((NULL, change) for change in ({"network_null_space": "weights"}, {"network_null_prompts": "a ring\na box"})),
    *((LALORA, change) for change in ({"lalora_lambda": 3.0}, {"lalora_prompts": "a ring\na box"})),
    *((PRIOR, change) for change in ({"prior_loss_weight": 3.0}, {"prior_prompts": "a ring"}, {"prior_states": 16},
                                     {"prior_batch_size": 1}, {"prior_max_timesteps": 500},
                                     {"prior_both_directions": True})),
    *((EXPERTS, change) for change in ({"num_experts": 3}, {"network_routing": "constant"},
                                       {"network_routing_balance": 10.0})),
    *(({}, change) for change in ({"network_element": "CrossAttention"}, {"network_timestep_rank": 1})),
]  # fmt: skip
_FACTS: dict[str, dict] = {}


@pytest.fixture(scope="module")
def model(case):
    return load_model(case.model)


def facts(case, model, **own):
    """The start of a session, and the loss and gradients of its first step with all numbers moved off it."""
    if repr(own) not in _FACTS:
        session = engine_case.session(case, case.job(**own), model)
        try:
            begin = [flat.clone() for flat in session.flat.values]
            buffers = [buffer.clone() for buffer in session.network.buffers()]
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for flat in session.flat.values:
                    flat.add_(0.1 * torch.randn(flat.shape, generator=generator))
            for stage in session.stages:
                stage.step(session.network, 0, 12)
            loss = loop.gradients(session, 0)
            _FACTS[repr(own)] = {"loss": loss, "values": [*begin, *buffers], "gradients": session.flat.gradients}
        finally:
            session.network.eject()
    return _FACTS[repr(own)]


@pytest.mark.parametrize(("own", "change"), OPTIONS, ids=lambda given: "-".join(given) or "plain")
def test_every_setting_acts_on_the_start_or_the_first_step(case, model, own, change) -> None:
    own = {"network_targets": "unet", "network_blocks(BASE = TextEncoder)": ["M00"], **own}
    before, after = facts(case, model, **own), facts(case, model, **{**own, **change})

    def differ(name):
        one, two = before[name], after[name]
        return len(one) != len(two) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, two, strict=True)
        )

    assert differ("values") or differ("gradients")
    if change.keys() & {"abm_enabled", "abm_lr", "network_null_space"}:
        assert differ("values"), "it is about the start"
    if change.keys() & {"lalora_lambda", "prior_loss_weight", "network_routing_balance"}:
        assert not differ("values") and float(after["loss"]) > float(before["loss"]), "it is about the penalty"


def test_settings_of_what_is_switched_off_are_told(case) -> None:
    for given, switch in (
        ({"abm_steps": 3, "abm_margin": 1}, "abm_enabled"),
        ({"lalora_prompts": "a"}, "lalora_lambda"),
        ({"prior_states": 8}, "prior_loss_weight"),
        ({"network_dora_axis": "output"}, "use_dora"),
        ({"network_type": "null", "network_null_prompts": "a"}, "network_null_space"),
        ({"network_type": "experts", "network_routing_balance": 1}, "network_routing"),
    ):
        names = [name for name in given if name != "network_type"]
        told = [line for line in load(case.settings(**given), catalogue()).warnings if line.startswith(switch)]
        assert len(told) == 1 and all(name in told[0] for name in names) and "no effect" in told[0]
    both = {"network_type": "lokr", "network_full_matrix": True, "network_decompose_both": True}
    assert any("network_decompose_both" in line for line in load(case.settings(**both), catalogue()).warnings)
    on = {**ABM, **LALORA, **PRIOR, "use_dora": True, "network_dora_axis": "output", "train_clip_skip": 1}
    assert not any("no effect" in line for line in load(case.settings(**on), catalogue()).warnings)


def test_the_file_has_the_form_that_the_job_asks_for(case) -> None:
    """The error that is told and stored is that of numpy's best matrices of the rank, and the file is those."""
    small = {"network_type": "loha", "network_blocks(BASE = TextEncoder)": ["M00"], "train_learning_rate": 0.05}
    own, _ = trained(case, "own_form", **small)
    plain, trace = trained(case, "plain_form", **small, export_format="lora", export_rank=3, network_strength=-2)
    rest = whole = 0.0
    for key in {name.partition(".")[0] for name in own}:
        one, two, three, four = (own[f"{key}.hada_w{side}"].double() for side in ("1_a", "1_b", "2_a", "2_b"))
        u, s, v = torch.linalg.svd((one @ two) * (three @ four) * (2 / 4), full_matrices=False)
        down, up = (plain[f"{key}.lora_{side}.weight"].flatten(1).double() for side in ("down", "up"))
        merged = up @ down * plain[f"{key}.alpha"] / len(down)
        wanted = -2 * (u[:, :3] * s[:3]) @ v[:3]
        assert len(down) == 3 and float((merged - wanted).norm()) < 1e-3 * float(wanted.norm())
        rest, whole = rest + float((s[3:] ** 2).sum()), whole + float((s**2).sum())
    error = (rest / whole) ** 0.5
    assert error > 0.05 and f"differs from what was trained by {error:.2%}, more than" in told(trace)
    _, noted = read_lora(case.places.loras / "plain_form.safetensors")
    assert float(noted["atelier_export_error"]) == pytest.approx(error, rel=1e-3)
    turned = {**small, "network_type": "oft", "network_rank": 4, "train_learning_rate": 1e-3}
    kept, trace = trained(case, "kept", **turned)
    assert any(name.endswith("oft_blocks") for name in kept) and "Raise export_rank" in told(trace)
    loose, trace = trained(case, "loose", **turned, export_max_error=1.0)
    assert any(name.endswith("lora_up.weight") for name in loose) and "Written as a plain LoRA" in told(trace)
