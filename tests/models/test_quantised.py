"""Scaled fp8 checkpoints are multiplied out; every other storage that is not plain numbers is refused by name."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from trainer.errors import ModelError
from trainer.models.assemble import assign
from trainer.models.load import load_model
from trainer.models.quantised import multiplied_out
from trainer.models.single import read_single, source_of

LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"
E4M3_MAX = 448.0


def text(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def scaled(weight: torch.Tensor, by_row: bool, kind: torch.dtype = torch.float8_e4m3fn):
    """fp8 numbers and their scale as converters make them: the largest number becomes the type's largest."""
    most = weight.abs().flatten(1).amax(1) if by_row else weight.abs().max()
    scale = most.clamp(min=1e-12) / torch.finfo(kind).max
    return (weight / (scale.view(-1, *(1,) * (weight.ndim - 1)) if by_row else scale)).to(kind), scale


def checkpoint(spelling: str, by_row: bool = False, kind: torch.dtype = torch.float8_e4m3fn) -> dict[str, torch.Tensor]:
    """An SD1 checkpoint whose matrices are stored in scaled fp8, as ComfyUI keeps them."""
    found = {}
    for name, tensor in tiny.checkpoint("sd1").items():
        if tensor.ndim < 2 or not name.endswith(".weight"):
            found[name] = tensor
            continue
        found[name], scale = scaled(tensor, by_row, kind)
        head = name.removesuffix("weight")
        found[f"{head}{spelling}"] = scale.view(-1, 1) if by_row else scale
        found[f"{head}{'scale_input' if spelling == 'scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
    return found


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_weights_are_the_weights(tmp_path, spelling, by_row):
    stored = checkpoint(spelling, by_row)
    if spelling == "scale_weight":
        stored["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    else:
        stored[f"{LAYER}.comfy_quant"] = text({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    save_file(stored, tmp_path / "a.safetensors")
    tiny.vocabulary(tmp_path / "vocabulary")
    model = load_model(tmp_path / "a.safetensors", vocabularies=[tmp_path / "vocabulary"])
    assert model.warnings == ()
    right = source_of(tiny.checkpoint("sd1"), {}, "right").parts
    found = {"unet": model.unet, "vae": model.vae, "te1": model.text_encoders[0].clip}
    for part, module in found.items():
        held = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
        for name, expected in right[part].items():
            if expected.ndim < 2 or name not in held:
                continue
            assert held[name].dtype == (torch.float32 if part == "vae" else torch.float16)
            # three bits of mantissa: half of a last place is 1/16, and the smallest steps are 2⁻⁹ of the scale
            off = (held[name].float() - expected).abs()
            least = expected.abs().flatten(1).amax(1).max() / E4M3_MAX * 2**-9
            assert bool((off <= expected.abs() / 16 + 2 * least).all()), name


def test_the_other_type_of_fp8_and_plain_fp8():
    weight = torch.randn(8, 8)
    stored, scale = scaled(weight, False, torch.float8_e5m2)
    out = multiplied_out({"a.weight": stored, "a.scale_weight": scale, "b.weight": stored}, "x")
    assert torch.allclose(out["a.weight"].float(), weight, rtol=1 / 8, atol=1e-4) and out["b.weight"] is stored
    assert set(out) == {"a.weight", "b.weight"}


PACKED = {
    "int8": {f"{LAYER}.weight": torch.zeros(4, 4, dtype=torch.int8), f"{LAYER}.weight_scale": torch.ones(4)},
    "bitsandbytes": {f"{LAYER}.weight.absmax": torch.ones(4), f"{LAYER}.weight.quant_map": torch.ones(16)},
    "bitsandbytes 8": {f"{LAYER}.SCB": torch.ones(4)},
    "quanto": {f"{LAYER}.weight._data": torch.zeros(4, 4, dtype=torch.int8)},
    "gptq": {f"{LAYER}.qweight": torch.zeros(4, 4, dtype=torch.int32)},
    "nvfp4": {f"{LAYER}.weight": torch.zeros(4, 4, dtype=torch.uint8), f"{LAYER}.weight_scale_2": torch.ones(1)},
    "blocks": {f"{LAYER}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(2, 2)},
    "bf16 with a scale": {f"{LAYER}.scale_weight": torch.tensor(2.0)},
    "scale that is none": {f"{LAYER}.weight": torch.zeros(4, 4).to(torch.float8_e5m2),
                           f"{LAYER}.scale_weight": torch.tensor(float("nan"))},
    "format": {f"{LAYER}.comfy_quant": text({"format": "int8_tensorwise"})},
    "rotated": {f"{LAYER}.comfy_quant": text({"format": "float8_e4m3fn", "convrot": True})},
    "format that is none": {f"{LAYER}.comfy_quant": torch.zeros(4, dtype=torch.uint8)},
    "new": {f"{LAYER}.weight_zero_point": torch.ones(4)},
    "text": {f"{TEXT}.scale": torch.ones(4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_other_storages_are_refused_by_name(kind):
    with pytest.raises(ModelError, match=r"stored: its weights are quantised \('?.*(to_q|q_proj).*fp16, bf16 or fp32"):
        source_of({**tiny.checkpoint("sd1"), **PACKED[kind]}, {}, "stored")


def test_the_metadata_names_the_format_too(tmp_path):
    said = {"layers": {LAYER: {"format": "nvfp4"}}}
    with pytest.raises(ModelError, match="nvfp4"):
        source_of(tiny.checkpoint("sd1"), {"_quantization_metadata": json.dumps(said)}, "x")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        read_single(tmp_path / "a.gguf")


def test_what_training_left_in_a_vae_is_no_storage():
    left = {f"first_stage_model.loss.discriminator.main.3.{name}": torch.ones(2) for name in ("weight", "running_mean")}
    assert source_of({**tiny.checkpoint("sd1"), **left}, {}, "x").parts["vae"]


def test_nothing_of_a_layer_in_use_is_thrown_away():
    from trainer.models.assemble import Placement

    module, where = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), Placement(None, None)
    tensors = {"0.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}
    assign(module, dict(tensors), "UNet", where)
    for name in ("0.bias", "0.weight.absmax", "0.outliers"):
        with pytest.raises(ModelError, match=f"{name} belongs to a layer in use"):
            assign(module, {**tensors, name: torch.ones(2)}, "UNet", where)
