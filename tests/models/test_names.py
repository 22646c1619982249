"""The names of layers: golden lists of full-size models, blocks, other spellings, and the way back to LDM names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import tiny
from ldm_names import checkpoint

from trainer.contracts import CROSS_ATTENTION, SELF_ATTENTION, TRANSFORMER, Role
from trainer.models.family import FAMILIES
from trainer.models.infer import unet_config
from trainer.models.keys_unet import plan_of_diffusers, plan_of_ldm, unet_names
from trainer.models.layers import aliases, layers_of
from trainer.params.names import BLOCKS

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {"sd1": (192, 86, 72), "sd2": (192, 86, 138), "sdxl": (722, 66, 264)}


def expand(text: str) -> list[str]:
    """Shell braces, the innermost first."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    words = [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else found[1].split(",")
    return [whole for word in words for whole in expand(text[: found.start()] + word + text[found.end() :])]


def golden(kind: str) -> dict[str, list[str]]:
    """The sections of a golden list; a key that nested braces spell several times counts once."""
    sections: dict[str, list[str]] = {}
    for line in (GOLDEN / f"kohya_{kind}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            keys = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            keys += dict.fromkeys(expand(line))
    return sections


@pytest.fixture(scope="module", params=tiny.KINDS)
def full(request):
    """(kind, its full-size model without memory)."""
    return request.param, tiny.full_model(request.param)


def test_the_keys_are_exactly_kohyas(full):
    kind, model = full
    expected = golden(kind)
    assert tuple(map(len, expected.values())) == COUNTS[kind]
    layers = [layer for layer in layers_of(model) if not layer.kind.endswith("norm")]
    assert len({layer.key for layer in layers}) == len(layers)
    by_section: dict[str, set[str]] = {"transformers": set(), "convolutions": set(), "text": set()}
    for layer in layers:
        unet = "transformers" if layer.role in TRANSFORMER else "convolutions"
        by_section[unet if layer.part == "unet" else "text"].add(layer.key)
    assert by_section == {name: set(keys) for name, keys in expected.items()}


def test_kinds_and_roles(full):
    kind, model = full
    layers = layers_of(model)
    assert {layer.kind for layer in layers} == {"linear", "conv1x1", "conv3x3", "groupnorm", "layernorm"}
    norms = {layer for layer in layers if layer.kind.endswith("norm")}
    assert {layer.role for layer in norms} == {Role.NORM}, "no type may take them for its layers"
    resnets = {"sd1": 22, "sd2": 22, "sdxl": 17}[kind]
    transformers = {"sd1": 16, "sd2": 16, "sdxl": 11}[kind]
    blocks = {"sd1": 16, "sd2": 16, "sdxl": 70}[kind]
    assert len(norms) == 2 * resnets + transformers + 3 * blocks
    unet = Counter(layer.role for layer in layers if layer.part == "unet")
    attention = dict.fromkeys((*SELF_ATTENTION, *CROSS_ATTENTION, Role.FF_IN, Role.FF_OUT), blocks)
    shortcuts = sum(layer.path.endswith("conv_shortcut") for layer in layers)
    samplers = {"sd1": 6, "sd2": 6, "sdxl": 4}[kind]
    assert unet == {
        **attention, Role.PROJECTION: 2 * transformers, Role.TIME: resnets, Role.CONV: 2 * resnets + shortcuts,
        Role.SAMPLER: samplers, Role.NORM: len(norms),
    }  # fmt: skip
    projections = {layer.kind for layer in layers if layer.path.endswith(("proj_in", "proj_out"))}
    assert projections == {"conv1x1" if kind == "sd1" else "linear"}
    assert {layer.role for layer in layers if layer.part != "unet"} == {*SELF_ATTENTION, Role.FF_IN, Role.FF_OUT}
    for layer in layers:
        assert model.unet.get_submodule(layer.path) is layer.module if layer.part == "unet" else layer.block == "BASE"


def test_blocks_of_sd1():
    found = {layer.path: layer.block for layer in layers_of(tiny.full_model("sd1"))}
    hand = {
        "down_blocks.0.resnets.0.conv1": "IN01", "down_blocks.0.attentions.1.proj_in": "IN02",
        "down_blocks.0.downsamplers.0.conv": "IN03", "down_blocks.1.attentions.0.proj_in": "IN04",
        "down_blocks.2.downsamplers.0.conv": "IN09", "down_blocks.3.resnets.1.conv2": "IN11",
        "mid_block.attentions.0.proj_out": "M00", "mid_block.resnets.1.conv1": "M00",
        "up_blocks.0.resnets.0.conv1": "OUT00", "up_blocks.0.upsamplers.0.conv": "OUT02",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "OUT03",
        "up_blocks.3.attentions.2.proj_in": "OUT11",
        "text_model.encoder.layers.0.mlp.fc1": "BASE",
    }  # fmt: skip
    assert {path: found[path] for path in hand} == hand
    assert set(found.values()) <= set(FAMILIES.get("sd1").blocks) and FAMILIES.get("sd1").blocks == BLOCKS


def test_blocks_of_sdxl_follow_its_own_keys():
    for layer in layers_of(tiny.full_model("sdxl")):
        if layer.part != "unet":
            continue
        word, number = re.match(r"lora_unet_(input|middle|output)_blocks?_(\d+)", layer.key).groups()
        expected = "M00" if word == "middle" else f"{'IN' if word == 'input' else 'OUT'}{int(number):02d}"
        assert layer.block == expected
        assert layer.block in FAMILIES.get("sdxl").blocks
    assert len(FAMILIES.get("sdxl").blocks) == 20


def test_other_spellings_of_sdxl_agree_with_diffusers():
    from diffusers.loaders import lora_conversion_utils as theirs

    model = tiny.full_model("sdxl")
    layers = [layer for layer in layers_of(model) if layer.part == "unet" and "attn" in layer.path]
    written = {f"{layer.key}.lora_down.weight": None for layer in layers}
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(written), model.unet.config)
    for old, new in (
        ("input_blocks", "down_blocks"),
        ("middle_block", "mid_block"),
        ("output_blocks", "up_blocks"),
    ):
        mapped = {key.replace(old, new): None for key in mapped}
    assert {f"{aliases(layer)[0]}.lora_down.weight" for layer in layers} == set(mapped)


def test_other_spellings_of_sd1_are_sgm():
    layers = {layer.path: layer for layer in layers_of(tiny.full_model("sd1"))}
    assert "lora_unet_output_blocks_2_1_conv" in aliases(layers["up_blocks.0.upsamplers.0.conv"])
    assert "lora_unet_output_blocks_5_2_conv" in aliases(layers["up_blocks.1.upsamplers.0.conv"])
    assert "lora_unet_input_blocks_1_1_proj_in" in aliases(layers["down_blocks.0.attentions.0.proj_in"])
    assert "lycoris_down_blocks_0_attentions_0_proj_in" in aliases(layers["down_blocks.0.attentions.0.proj_in"])


def test_no_two_layers_share_a_spelling(full):
    _, model = full
    spellings = [name for layer in layers_of(model) for name in (layer.key, *aliases(layer))]
    assert len(set(spellings)) == len(spellings)


def test_every_ldm_name_goes_there_and_back(full):
    kind, model = full
    prefix = "model.diffusion_model."
    ldm = [name.removeprefix(prefix) for name in checkpoint(tiny.FULL[kind], None) if name.startswith(prefix)]
    names = unet_names(plan_of_ldm(ldm))
    diffusers = [names.to_diffusers(name) for name in ldm]
    assert set(diffusers) == set(model.unet.state_dict())
    assert plan_of_diffusers(diffusers) == plan_of_ldm(ldm)
    assert [names.to_ldm(name) for name in diffusers] == ldm


def test_full_sizes_are_inferred(full):
    kind, model = full
    config = unet_config(model.unet.state_dict())
    widths = {"sdxl": [320, 640, 1280]}.get(kind, [320, 640, 1280, 1280])
    heads = {"sd1": 8, "sd2": [5, 10, 20, 20], "sdxl": [5, 10, 20]}[kind]
    assert (config["block_out_channels"], config["attention_head_dim"]) == (widths, heads)
    assert config["cross_attention_dim"] == {"sd1": 768, "sd2": 1024, "sdxl": 2048}[kind]
    if kind == "sdxl":
        assert config["transformer_layers_per_block"][1:] == [2, 10]
        assert model.unet.config.addition_time_embed_dim == 256
    texts = [(e.clip.config.hidden_size, e.clip.config.num_attention_heads, e.layers) for e in model.text_encoders]
    assert texts == {"sd1": [(768, 12, 12)], "sd2": [(1024, 16, 23)], "sdxl": [(768, 12, 12), (1280, 20, 32)]}[kind]
    assert model.vae.config.block_out_channels == [128, 256, 512, 512] and model.latent_factor == 8
    parameters = sum(p.numel() for p in model.unet.parameters())
    assert parameters == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[kind]
