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
from pathlib import Path

import torch
from ldm_names import TOKENS, WINDOW, Shape
from ldm_names import checkpoint as every_tensor
from safetensors.torch import save_file
from torch import Tensor

KINDS = ("sd1", "sd2", "sdxl")
START, END = TOKENS - 2, TOKENS - 1
Tensors = dict[str, Tensor]


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
FULL = {  # the real sizes
    "sd1": Shape(
        (1, 1, 1, 0),
        1,
        False,
        (("clip", "cond_stage_model.transformer.text_model.", 768, 12),),
        mult=(1, 2, 4, 4),
        width=320,
        layers=2,
        vae=(128, 256, 512, 512),
        vae_layers=2,
    ),
    "sd2": Shape(
        (1, 1, 1, 0),
        1,
        True,
        (("open_clip", "cond_stage_model.model.", 1024, 24),),
        mult=(1, 2, 4, 4),
        width=320,
        layers=2,
        vae=(128, 256, 512, 512),
        vae_layers=2,
    ),
    "sdxl": Shape(
        (0, 2, 10),
        10,
        True,
        (
            ("clip", "conditioner.embedders.0.transformer.text_model.", 768, 12),
            ("open_clip", "conditioner.embedders.1.model.", 1280, 32),
        ),
        sizes=256,
        mult=(1, 2, 4),
        width=320,
        layers=2,
        vae=(128, 256, 512, 512),
        vae_layers=2,
    ),
}


def checkpoint(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors of a tiny checkpoint in LDM/sgm spelling."""
    return {name: tensor.to(dtype).contiguous() for name, tensor in every_tensor(SHAPES[kind], seed).items()}


# -------------------------------------------------------------------- vocabulary


def letters() -> list[str]:
    """CLIP's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def token_ids() -> dict[str, int]:
    """A byte-level CLIP vocabulary: every letter is a token, start and end have CLIP's ids."""
    tokens = [*letters(), *(letter + "</w>" for letter in letters())]
    return {**{token: n for n, token in enumerate(tokens)}, "<|startoftext|>": START, "<|endoftext|>": END}


def vocabulary(path: Path) -> Path:
    """Write a byte-level CLIP vocabulary without merges; returns
    its folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(token_ids()), encoding="utf-8")
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
        text = converted_text(tensors, style, prefix, width, layers - drop)
        _part(path / f"text_encoder{suffix}", "model", text, config)
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


def model(
    kind: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    v_pred: bool = False,
    tensors: Tensors | None = None,
    device: str = "cpu",
    resting: bool = False,
):
    """A loaded tiny model with a byte-level vocabulary (a token is one letter of the prompt), without any file.

    `tensors` in LDM/sgm spelling replace the random ones; `resting`: they are a host's.
    """
    from trainer.models.assemble import assemble
    from trainer.models.single import source_of
    from trainer.models.tokenizer import Vocabulary

    source = source_of(checkpoint(kind, seed, dtype) if tensors is None else tensors, {}, f"tiny-{kind}")
    source.vocabularies = {part: Vocabulary(token_ids(), ()) for part in ("te1", "te2")}
    return assemble(source, v_pred=v_pred, device=device, resting=resting)


def full_model(kind: str):
    """The full-size model with tensors that have only a shape (on `meta`)."""
    return model(kind, tensors=every_tensor(FULL[kind], None), device="meta")


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
    n = len(Shape.vae)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": list(Shape.vae),
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


def converted_text(tensors: Tensors, style: str, prefix: str, width: int, layers: int) -> Tensors:
    """The first `layers` layers of a text encoder in transformers' spelling, by diffusers' converters."""
    from diffusers.loaders import single_file_utils as theirs

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


def encoder_file(path: Path, kind: str, number: int, layout: str, seed: int = 1) -> Path:
    """A text encoder alone, as `layout` has it: hf (transformers 4), bare (transformers 5), open_clip."""
    style, prefix, width, layers = SHAPES[kind].texts[number]
    tensors = checkpoint(kind, seed)
    if layout == "open_clip":
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    else:
        drop = kind == "sd2"
        found = dict(converted_text(tensors, style, prefix, width, layers - drop))
        if layout == "bare":
            found = {name.removeprefix("text_model."): t for name, t in found.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path)
    return path
