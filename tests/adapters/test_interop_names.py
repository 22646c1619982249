"""LoRA files as other programs name their layers: every one of a full-size model is found, and none is mistaken.

The names are made from diffusers' own module names and from the block table of the LDM code, written out here.
"""

from __future__ import annotations

import functools
import re

import pytest
import tiny
import torch
from torch import nn

from trainer.adapters.base import AdapterSpec
from trainer.adapters.network import build_network
from trainer.errors import AdapterError
from trainer.models.layers import layers_of
from trainer.params.names import BLOCKS

OWNERS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
RESNET = {
    "time_emb_proj": "emb_layers.1",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# diffusers block → LDM block: each level has its resnets (and attentions), then one place for the sampler.
SDXL = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    **{f"up_blocks.0.resnets.{n}": f"output_blocks.{n}.0" for n in range(3)},
    **{f"up_blocks.0.attentions.{n}": f"output_blocks.{n}.1" for n in range(3)},
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    **{f"up_blocks.1.resnets.{n}": f"output_blocks.{n + 3}.0" for n in range(3)},
    **{f"up_blocks.1.attentions.{n}": f"output_blocks.{n + 3}.1" for n in range(3)},
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    **{f"up_blocks.2.resnets.{n}": f"output_blocks.{n + 6}.0" for n in range(3)},
}
COUNTS = {"sdxl": (788, {"te1": 72, "te2": 192}), "sd1": (278, {"te1": 72})}


def sgm(path: str) -> str:
    """A diffusers path of SDXL in LDM spelling."""
    head = max((name for name in SDXL if path == name or path.startswith(f"{name}.")), key=len)
    tail = path[len(head) :]
    for mine, theirs in RESNET.items():
        tail = re.sub(rf"^\.{mine}$", f".{theirs}", tail)
    return SDXL[head] + tail


@functools.cache
def paths(kind: str) -> dict[str, tuple[str, ...]]:
    """diffusers' module paths by part, of the layers that kohya's trainer knows."""
    model = tiny.full_model(kind)
    found = [
        f"{name}.{inner}"
        for name, owner in model.unet.named_modules()
        if type(owner).__name__ in OWNERS
        for inner, module in owner.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    texts = {}
    for part, encoder in zip(("te1", "te2"), model.text_encoders, strict=False):
        texts[part] = tuple(
            f"text_model.encoder.layers.{n}.{name}"
            for n in range(len(encoder.transformer.encoder.layers))
            for name in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
                "mlp.fc1",
                "mlp.fc2",
            )
        )
    return {"unet": tuple(found), **texts}


@functools.cache
def trained(kind: str):
    """A rank-1 network on every layer of the full-size model (which itself is on `meta`)."""
    spec = AdapterSpec("c3lier", rank=1, alpha=1.0)
    layers = layers_of(tiny.full_model(kind))
    return build_network(layers, spec, BLOCKS, "Full", ("unet", "te1", "te2"), torch.Generator().manual_seed(0))


@functools.cache
def keys(kind: str) -> dict[tuple[str, str], str]:
    return {(layer.part, layer.path): layer.key for layer in layers_of(tiny.full_model(kind))}


def flat(path: str) -> str:
    return path.replace(".", "_")


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight", "")
STYLES = {  # program: (unet layer, text layer, names of the tensors), of a path and the number of the text encoder
    ("sdxl", "kohya"): (lambda p: f"lora_unet_{flat(sgm(p))}", lambda p, n: f"lora_te{n}_{flat(p)}", KOHYA),
    ("sdxl", "TrainTrain, OneTrainer legacy"): (
        lambda p: f"lora_unet_{flat(p)}",
        lambda p, n: f"lora_te{n}_{flat(p)}",
        KOHYA,
    ),
    ("sdxl", "OneTrainer OMI"): (lambda p: f"unet.{sgm(p)}", lambda p, n: f"clip_{' lg'[n]}.{p}", KOHYA),
    ("sdxl", "OneTrainer dotted"): (lambda p: f"lora_unet.{p}", lambda p, n: f"lora_te{n}.{p}", KOHYA),
    ("sdxl", "diffusers"): (lambda p: f"unet.{p}", lambda p, n: f"text_encoder{['', '', '_2'][n]}.{p}", PEFT),
    ("sdxl", "diffusers with transformers 5"): (
        lambda p: f"unet.{p}",
        lambda p, n: f"text_encoder{['', '', '_2'][n]}.{p.removeprefix('text_model.')}",
        PEFT,
    ),
    ("sdxl", "ComfyUI"): (
        lambda p: f"diffusion_model.{sgm(p)}",
        lambda p, n: f"text_encoders.clip_{' lg'[n]}.transformer.{p}",
        KOHYA,
    ),
    ("sd1", "kohya, TrainTrain"): (lambda p: f"lora_unet_{flat(p)}", lambda p, n: f"lora_te_{flat(p)}", KOHYA),
    ("sd1", "diffusers"): (lambda p: f"unet.{p}", lambda p, n: f"text_encoder.{p}", PEFT),
    ("sd1", "LyCORIS alone"): (lambda p: f"lycoris_{flat(p)}", lambda p, n: f"lycoris_{flat(p)}", KOHYA),
    ("sd1", "PEFT alone"): (lambda p: f"base_model.model.{p}", lambda p, n: f"base_model.model.{p}", PEFT),
    ("sd1", "PEFT in memory"): (
        lambda p: f"base_model.model.{p}",
        lambda p, n: p,
        ("lora_A.default.weight", "lora_B.default.weight", ""),
    ),
}


@pytest.mark.parametrize(("kind", "program"), list(STYLES))
def test_every_layer_of_a_full_size_model_is_found(kind: str, program: str) -> None:
    unet, text, (down, up, alpha) = STYLES[kind, program]
    named = [("unet", path, unet(path)) for path in paths(kind)["unet"]]
    for n, part in enumerate(COUNTS[kind][1], 1):
        named += [(part, path, text(path, n)) for path in paths(kind)[part]]
    net = trained(kind)
    shapes = {(a.part, a.key): (a.down.shape, a.up.shape) for a in net}
    file, wanted = {}, {}
    for number, (part, path, name) in enumerate(named, 1):
        key = keys(kind)[part, path]
        down_shape, up_shape = shapes[part, key]
        file[f"{name}.{down}"] = torch.ones(down_shape)
        file[f"{name}.{up}"] = torch.full((*up_shape, *(1,) * (len(down_shape) - 2)), float(number))
        if alpha:
            file[f"{name}.{alpha}"] = torch.tensor(1.0)
        wanted[key] = number
    count, texts = COUNTS[kind]
    assert len(wanted) == count + sum(texts.values())
    report = net.load(file)
    assert (report.matched, report.unmatched, report.untouched) == (len(wanted), (), ())
    values = net.state_dict()
    for key, number in wanted.items():
        value = values[f"adapters.{key}.up"].flatten()[0] * values[f"adapters.{key}.down"].flatten()[0]
        assert float(value) == pytest.approx(number)


def test_old_diffusers_kept_lora_in_attention_processors() -> None:
    net = trained("sd1")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    text, text_key = "text_encoder.text_model.encoder.layers", "lora_te_text_model_encoder_layers"
    names = {
        f"unet.{block}.attn1.processor.to_q_lora": f"lora_unet_{flat(block)}_attn1_to_q",
        f"unet.{block}.attn2.processor.to_out_lora": f"lora_unet_{flat(block)}_attn2_to_out_0",
        f"{block}.attn1.processor.to_v_lora": f"lora_unet_{flat(block)}_attn1_to_v",
        f"{text}.3.self_attn.to_out_lora": f"{text_key}_3_self_attn_out_proj",
        f"{text}.0.self_attn.q_proj.lora_linear_layer": f"{text_key}_0_self_attn_q_proj",
    }
    file = {}
    for number, (name, key) in enumerate(names.items(), 1):
        file[f"{name}.down.weight"] = torch.ones_like(net.adapters[key].down)
        file[f"{name}.up.weight"] = torch.full_like(net.adapters[key].up, float(number))
    report = net.load(file)
    assert report.matched == len(names) and not report.unmatched
    for number, key in enumerate(names.values(), 1):
        assert torch.allclose(net.adapters[key].delta(), torch.tensor(float(number)))


def test_files_without_a_known_layer_are_refused_and_strange_ones_named() -> None:
    net = trained("sdxl")
    key = next(iter(net.adapters))
    for name in ("text_model.encoder.layers.0.mlp.fc1", "lycoris_text_model_encoder_layers_0_mlp_fc1", "lora_te_x"):
        with pytest.raises(AdapterError, match="None of the 1 tensors"):
            net.load({f"{name}.lora_down.weight": torch.ones(1, 768)})
    good = {
        f"{key}.lora_down.weight": torch.ones_like(net.adapters[key].down),
        f"{key}.lora_up.weight": torch.ones_like(net.adapters[key].up),
    }
    report = net.load({**good, "bundle_emb.word.string_to_param": torch.ones(2)})
    assert report.matched == 1 and report.unmatched == ("bundle_emb.word.string_to_param",)
    assert len(report.untouched) == len(net) - 1
