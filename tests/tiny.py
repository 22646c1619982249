"""Tiny random base models of every family, written in well under a second: as a single file, as a diffusers folder, in
memory.

    tiny.single_file("sd1", tmp_path / "model.safetensors")     an LDM/sgm checkpoint (needs a vocabulary:
tiny.vocabulary(path)) tiny.folder("sdxl", tmp_path / "folder")                     the same weights as a diffusers
folder, with its tokenizer tiny.model("sd2")                                            the same weights as a loaded
Model

The names are written out here by the rules of the LDM code, and the folder is made by diffusers' own converters, so
that both are independent of the trainer's name maps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

KINDS = ("sd1", "sd2", "sdxl")
TOKENS, WINDOW = 49408, 77
START, END = TOKENS - 2, TOKENS - 1
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one tiny model: transformer depth per level and in the middle, text widths, whether projections are
    linear."""

    depth: tuple[int, ...]
    mid: int
    linear: bool
    texts: tuple[tuple[str, str, int, int], ...]  # (kind, prefix, width, layers)
    sizes: int = 0  # width of the embedding of one size number
    mult: tuple[int, ...] = (1, 2, 2)
    width: int = 32
    layers: int = 1

    @property
    def context(self) -> int:
        return sum(width for _, _, width, _ in self.texts)


SHAPES = {
    "sd1": Shape((1, 1, 0), 1, False, (("clip", "cond_stage_model.transformer.text_model.", 64, 2),)),
    "sd2": Shape((1, 1, 0), 1, True, (("open_clip", "cond_stage_model.model.", 64, 3),)),
    "sdxl": Shape(
        (0, 1, 2),
        2,
        True,
        (
            ("clip", "conditioner.embedders.0.transformer.text_model.", 64, 3),
            ("open_clip", "conditioner.embedders.1.model.", 128, 3),
        ),
        sizes=16,
        mult=(1, 2, 4),
    ),
}
VAE_WIDTHS = (32, 32, 64, 64)


class Writer:
    """Collects random tensors under their names."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def random(self, name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        std = 0.7 / math.sqrt(math.prod(shape[1:]) or 1) if std is None else std
        self.tensors[name] = torch.randn(shape, generator=self.rng) * std + mean

    def linear(self, name: str, out: int, into: int, bias: bool = True) -> None:
        self.random(f"{name}.weight", out, into)
        if bias:
            self.random(f"{name}.bias", out, std=0.05)

    def conv(self, name: str, out: int, into: int, kernel: int) -> None:
        self.random(f"{name}.weight", out, into, kernel, kernel)
        self.random(f"{name}.bias", out, std=0.05)

    def norm(self, name: str, width: int) -> None:
        self.random(f"{name}.weight", width, std=0.1, mean=1.0)
        self.random(f"{name}.bias", width, std=0.05)


def checkpoint(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors of a tiny checkpoint in LDM/sgm spelling."""
    shape, writer = SHAPES[kind], Writer(seed)
    unet(writer, shape)
    vae(writer)
    for style, prefix, width, layers in shape.texts:
        (clip if style == "clip" else open_clip)(writer, prefix, width, layers)
    return {name: tensor.to(dtype).contiguous() for name, tensor in writer.tensors.items()}


def unet(w: Writer, shape: Shape, p: str = "model.diffusion_model.") -> None:
    """An LDM UNet."""
    embedding = 4 * shape.width
    w.linear(f"{p}time_embed.0", embedding, shape.width)
    w.linear(f"{p}time_embed.2", embedding, embedding)
    if shape.sizes:
        w.linear(f"{p}label_emb.0.0", embedding, shape.texts[-1][2] + 6 * shape.sizes)
        w.linear(f"{p}label_emb.0.2", embedding, embedding)
    w.conv(f"{p}input_blocks.0.0", shape.width, 4, 3)
    channels, n, skips = shape.width, 1, [shape.width]
    for level, mult in enumerate(shape.mult):
        for _ in range(shape.layers):
            _resnet(w, f"{p}input_blocks.{n}.0", channels, mult * shape.width, embedding)
            channels = mult * shape.width
            _transformer(w, f"{p}input_blocks.{n}.1", channels, shape.depth[level], shape)
            skips.append(channels)
            n += 1
        if level + 1 < len(shape.mult):
            w.conv(f"{p}input_blocks.{n}.0.op", channels, channels, 3)
            skips.append(channels)
            n += 1
    _resnet(w, f"{p}middle_block.0", channels, channels, embedding)
    _transformer(w, f"{p}middle_block.1", channels, shape.mid, shape)
    _resnet(w, f"{p}middle_block.2", channels, channels, embedding)
    n = 0
    for level in reversed(range(len(shape.mult))):
        for j in range(shape.layers + 1):
            width = shape.mult[level] * shape.width
            _resnet(w, f"{p}output_blocks.{n}.0", channels + skips.pop(), width, embedding)
            channels = width
            _transformer(w, f"{p}output_blocks.{n}.1", channels, shape.depth[level], shape)
            if level and j == shape.layers:
                w.conv(f"{p}output_blocks.{n}.{2 if shape.depth[level] else 1}.conv", channels, channels, 3)
            n += 1
    w.norm(f"{p}out.0", channels)
    w.conv(f"{p}out.2", 4, channels, 3)


def _resnet(w: Writer, name: str, into: int, out: int, embedding: int) -> None:
    w.norm(f"{name}.in_layers.0", into)
    w.conv(f"{name}.in_layers.2", out, into, 3)
    w.linear(f"{name}.emb_layers.1", out, embedding)
    w.norm(f"{name}.out_layers.0", out)
    w.conv(f"{name}.out_layers.3", out, out, 3)
    if into != out:
        w.conv(f"{name}.skip_connection", out, into, 1)


def _transformer(w: Writer, name: str, width: int, depth: int, shape: Shape) -> None:
    if not depth:
        return
    w.norm(f"{name}.norm", width)
    for word in ("proj_in", "proj_out"):
        if shape.linear:
            w.linear(f"{name}.{word}", width, width)
        else:
            w.conv(f"{name}.{word}", width, width, 1)
    for layer in range(depth):
        block = f"{name}.transformer_blocks.{layer}"
        for word, context in (("attn1", width), ("attn2", shape.context)):
            w.linear(f"{block}.{word}.to_q", width, width, bias=False)
            w.linear(f"{block}.{word}.to_k", width, context, bias=False)
            w.linear(f"{block}.{word}.to_v", width, context, bias=False)
            w.linear(f"{block}.{word}.to_out.0", width, width)
        w.linear(f"{block}.ff.net.0.proj", 8 * width, width)
        w.linear(f"{block}.ff.net.2", width, 4 * width)
        for k in (1, 2, 3):
            w.norm(f"{block}.norm{k}", width)


def vae(w: Writer, p: str = "first_stage_model.", widths: tuple[int, ...] = VAE_WIDTHS, layers: int = 1) -> None:
    """An LDM VAE with a factor of 2 per level after the first."""

    def resnet(name: str, into: int, out: int) -> None:
        w.norm(f"{name}.norm1", into)
        w.conv(f"{name}.conv1", out, into, 3)
        w.norm(f"{name}.norm2", out)
        w.conv(f"{name}.conv2", out, out, 3)
        if into != out:
            w.conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.block_1", width, width)
        w.norm(f"{name}.attn_1.norm", width)
        for word in ("q", "k", "v", "proj_out"):
            w.conv(f"{name}.attn_1.{word}", width, width, 1)
        resnet(f"{name}.block_2", width, width)

    w.conv(f"{p}encoder.conv_in", widths[0], 3, 3)
    channels = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            resnet(f"{p}encoder.down.{i}.block.{j}", channels, width)
            channels = width
        if i + 1 < len(widths):
            w.conv(f"{p}encoder.down.{i}.downsample.conv", channels, channels, 3)
    middle(f"{p}encoder.mid", channels)
    w.norm(f"{p}encoder.norm_out", channels)
    w.conv(f"{p}encoder.conv_out", 8, channels, 3)
    w.conv(f"{p}decoder.conv_in", channels, 4, 3)
    middle(f"{p}decoder.mid", channels)
    for i in reversed(range(len(widths))):
        for j in range(layers + 1):
            resnet(f"{p}decoder.up.{i}.block.{j}", channels, widths[i])
            channels = widths[i]
        if i:
            w.conv(f"{p}decoder.up.{i}.upsample.conv", channels, channels, 3)
    w.norm(f"{p}decoder.norm_out", channels)
    w.conv(f"{p}decoder.conv_out", 3, channels, 3)
    w.conv(f"{p}quant_conv", 8, 8, 1)
    w.conv(f"{p}post_quant_conv", 4, 4, 1)


def clip(w: Writer, p: str, width: int, layers: int) -> None:
    """A text tower in transformers' spelling."""
    w.random(f"{p}embeddings.token_embedding.weight", TOKENS, width, std=0.3)
    w.random(f"{p}embeddings.position_embedding.weight", WINDOW, width, std=0.1)
    w.tensors[f"{p}embeddings.position_ids"] = torch.arange(WINDOW).unsqueeze(0)
    for i in range(layers):
        for word in ("k_proj", "v_proj", "q_proj", "out_proj"):
            w.linear(f"{p}encoder.layers.{i}.self_attn.{word}", width, width)
        w.norm(f"{p}encoder.layers.{i}.layer_norm1", width)
        w.norm(f"{p}encoder.layers.{i}.layer_norm2", width)
        w.linear(f"{p}encoder.layers.{i}.mlp.fc1", 4 * width, width)
        w.linear(f"{p}encoder.layers.{i}.mlp.fc2", width, 4 * width)
    w.norm(f"{p}final_layer_norm", width)


def open_clip(w: Writer, p: str, width: int, layers: int) -> None:
    """A text tower in OpenCLIP's spelling."""
    w.random(f"{p}token_embedding.weight", TOKENS, width, std=0.3)
    w.random(f"{p}positional_embedding", WINDOW, width, std=0.1)
    w.random(f"{p}text_projection", width, width)
    w.tensors[f"{p}logit_scale"] = torch.tensor(4.6)
    for i in range(layers):
        block = f"{p}transformer.resblocks.{i}"
        w.random(f"{block}.attn.in_proj_weight", 3 * width, width)
        w.random(f"{block}.attn.in_proj_bias", 3 * width, std=0.05)
        w.linear(f"{block}.attn.out_proj", width, width)
        w.norm(f"{block}.ln_1", width)
        w.norm(f"{block}.ln_2", width)
        w.linear(f"{block}.mlp.c_fc", 4 * width, width)
        w.linear(f"{block}.mlp.c_proj", width, 4 * width)
    w.norm(f"{p}ln_final", width)


# -------------------------------------------------------------------- vocabulary


def letters() -> list[str]:
    """CLIP's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def vocabulary(path: Path) -> Path:
    """Write a byte-level CLIP vocabulary (every letter is a token, no merges; start and end have CLIP's ids); returns
    its folder."""
    path.mkdir(parents=True, exist_ok=True)
    tokens = [*letters(), *(letter + "</w>" for letter in letters())]
    ids = {**{token: n for n, token in enumerate(tokens)}, "<|startoftext|>": START, "<|endoftext|>": END}
    (path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return path


# -------------------------------------------------------------------- files, folders, models


def single_file(
    kind: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None
) -> Path:
    """Write a tiny checkpoint as .safetensors (or .ckpt by its suffix); returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint(kind, seed, dtype)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path, metadata=metadata)
    return path


def folder(
    kind: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, prediction: str = "epsilon"
) -> Path:
    """Write the same weights as a diffusers folder through diffusers' own converters; returns its path."""
    from diffusers.loaders import single_file_utils as theirs

    shape, tensors = SHAPES[kind], checkpoint(kind, seed, dtype)
    config = unet_config(shape)
    _part(path / "unet", "diffusion_pytorch_model", theirs.convert_ldm_unet_checkpoint(dict(tensors), config), config)
    config = vae_config(0.13025 if shape.sizes else 0.18215)
    _part(path / "vae", "diffusion_pytorch_model", theirs.convert_ldm_vae_checkpoint(dict(tensors), config), config)
    for n, (style, prefix, width, layers) in enumerate(shape.texts):
        suffix = f"_{n + 1}" if n else ""
        drop = kind == "sd2"
        config = text_config(style, width, layers - drop)
        _part(
            path / f"text_encoder{suffix}", "model", _text(theirs, tensors, style, prefix, width, layers - drop), config
        )
        vocabulary(path / f"tokenizer{suffix}")
        pad = "!" if style == "open_clip" else "<|endoftext|>"
        (path / f"tokenizer{suffix}" / "special_tokens_map.json").write_text(
            json.dumps({"pad_token": pad}), encoding="utf-8"
        )
    (path / "scheduler").mkdir(exist_ok=True)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    (path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**noise, "prediction_type": prediction}), encoding="utf-8"
    )
    return path


def model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, v_pred: bool = False):
    """A loaded tiny model with a byte-level vocabulary (a token is one letter of the prompt), without any file."""
    from trainer.models.assemble import assemble
    from trainer.models.single import source_of
    from trainer.models.tokenizer import Vocabulary

    source = source_of(checkpoint(kind, seed, dtype), {}, f"tiny-{kind}")
    tokens = [*letters(), *(letter + "</w>" for letter in letters())]
    ids = {**{token: n for n, token in enumerate(tokens)}, "<|startoftext|>": START, "<|endoftext|>": END}
    source.vocabularies = {part: Vocabulary(ids, ()) for part in ("te1", "te2")}
    return assemble(source, v_pred=v_pred)


def unet_config(shape: Shape) -> dict:
    """diffusers' configuration of the tiny UNet, written by hand."""
    widths = [mult * shape.width for mult in shape.mult]
    depth = [layers or shape.mid for layers in shape.depth]
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": shape.layers,
        "cross_attention_dim": shape.context,
        "use_linear_projection": shape.linear,
        "down_block_types": ["CrossAttnDownBlock2D" if layers else "DownBlock2D" for layers in shape.depth],
        "up_block_types": ["CrossAttnUpBlock2D" if layers else "UpBlock2D" for layers in reversed(shape.depth)],
        "transformer_layers_per_block": depth,
        "norm_num_groups": 32,
        "attention_head_dim": [max(1, width // 64) for width in widths] if shape.linear else 8,
    }
    if shape.sizes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": shape.sizes,
            "projection_class_embeddings_input_dim": shape.texts[-1][2] + 6 * shape.sizes,
        }
    return config


def vae_config(scale: float = 0.18215) -> dict:
    """diffusers' configuration of the tiny VAE."""
    n = len(VAE_WIDTHS)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": list(VAE_WIDTHS),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "norm_num_groups": 32,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "scaling_factor": scale,
    }


def text_config(style: str, width: int, layers: int) -> dict:
    """transformers' configuration of a tiny text encoder."""
    return {
        "vocab_size": TOKENS,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": WINDOW,
        "projection_dim": width,
        "hidden_act": "quick_gelu" if style == "clip" else "gelu",
        "eos_token_id": END,
        "bos_token_id": START,
    }


def _text(theirs, tensors: Tensors, style: str, prefix: str, width: int, layers: int) -> Tensors:
    """A text encoder's tensors in transformers' spelling, by diffusers' converters."""
    if style == "clip":
        return theirs.convert_ldm_clip_checkpoint(tensors, remove_prefix=prefix.removesuffix("text_model."))

    class Shell:
        config = type("Config", (), {"hidden_size": width})

    converted = theirs.convert_open_clip_checkpoint(Shell, tensors, prefix=prefix)
    return {name: tensor for name, tensor in converted.items() if f"layers.{layers}." not in name}


def _part(path: Path, stem: str, tensors: Tensors, config: dict) -> None:
    path.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if tensor.is_floating_point()}
    save_file(whole, path / f"{stem}.safetensors")
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
