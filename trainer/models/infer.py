"""Configurations of UNet, VAE and text encoders from the shapes of their tensors: no table of sizes.

What shapes cannot tell is a rule: with convolutional projections the attention has 8 heads, with linear ones heads of
width 64; text encoders have heads of width 64; the GroupNorms have 32 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .family import UnetFacts
from .keys_text import layer_count
from .keys_unet import UnetPlan, plan_of_diffusers
from .keys_vae import vae_size

GROUPS = 32
Tensors = Mapping[str, Tensor]


def heads_of(width: int) -> int:
    """The number of attention heads of width 64; 1 where the width is not a multiple of 64."""
    return width // 64 if width % 64 == 0 else 1


def unet_facts(unet: Tensors, encoders: tuple[str, ...]) -> UnetFacts:
    """What tells families apart, from UNet tensors in diffusers spelling."""
    linear = any(name.endswith(".proj_in.weight") and tensor.dim() == 2 for name, tensor in unet.items())
    return UnetFacts(linear, "add_embedding.linear_1.weight" in unet, encoders)


def unet_config(unet: Tensors) -> dict[str, Any]:
    """The `UNet2DConditionModel` configuration of UNet tensors in diffusers spelling. Raises ModelError when none
    fits."""
    plan = plan_of_diffusers(unet)
    if not plan.down or not plan.up or len(plan.down) != len(plan.up):
        raise ModelError(
            f"UNet: {len(plan.down)} down and {len(plan.up)} up blocks were found; the file is incomplete."
        )
    _check_uniform(plan)
    widths = [_shape(unet, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(len(plan.down))]
    facts = unet_facts(unet, ())
    context = context_width(unet)
    config: dict[str, Any] = {
        "in_channels": _shape(unet, "conv_in.weight")[1],
        "out_channels": _shape(unet, "conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": len(plan.down[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if level[0] else "DownBlock2D" for level in plan.down],
        "up_block_types": ["CrossAttnUpBlock2D" if level[0] else "UpBlock2D" for level in plan.up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if plan.mid else "UNetMidBlock2D",
        "cross_attention_dim": context,
        "use_linear_projection": facts.linear,
        "attention_head_dim": [heads_of(width) for width in widths] if facts.linear else 8,
        "norm_num_groups": GROUPS,
        "time_embedding_dim": _shape(unet, "time_embedding.linear_1.weight")[0],
        **_depths(plan),
    }
    if facts.sizes:
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": side(unet, "add_embedding.linear_1.weight", 1),
        }
    return config


def _check_uniform(plan: UnetPlan) -> None:
    """Raise ModelError unless every level has the same number of resnets, and a transformer behind all of them or
    none."""
    layers = len(plan.down[0])
    lengths = [len(level) for level in plan.down] + [len(level) - 1 for level in plan.up]
    mixed = [level for level in (*plan.down, *plan.up) if any(level) and not all(level)]
    if not layers or set(lengths) != {layers} or mixed:
        raise ModelError(
            f"UNet: its blocks (transformer depths {plan.down}, middle {plan.mid}, {plan.up}) are not those "
            "of a Stable Diffusion UNet; the file is incomplete or of another architecture."
        )


def _depths(plan: UnetPlan) -> dict[str, Any]:
    """The transformer depths as diffusers wants them: one number a level where they agree, else one a transformer.

    The middle block takes its depth from the last level, so a last level without transformers carries the middle's.
    """
    down = [list(level) if any(level) else [max(plan.mid, 1)] * len(level) for level in plan.down]
    if any(plan.down[-1]) and plan.mid and plan.mid != plan.down[-1][0]:
        raise ModelError(
            f"UNet: the middle block has depth {plan.mid}, the last level {plan.down[-1]}; such a UNet cannot be built."
        )
    same = all(len(set(level)) <= 1 for level in (*plan.down, *plan.up))
    mirrored = all(not any(b) or a[0] == b[0] for a, b in zip(reversed(plan.down), plan.up, strict=True))
    if same and mirrored:
        return {"transformer_layers_per_block": [level[0] for level in down]}
    up = [list(level) if any(level) else [1] * len(level) for level in plan.up]
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def size_width(unet_config: Mapping[str, Any], pooled: int) -> int:
    """Width of the sinusoidal embedding of each of SDXL's six size numbers, given the width of the pooled text."""
    total: int = unet_config["projection_class_embeddings_input_dim"] - pooled
    if total <= 0 or total % 12:
        raise ModelError(
            f"UNet: its size conditioning takes {total + pooled} numbers, the pooled text has {pooled}; "
            "the rest is not six embeddings. The text encoders do not belong to this UNet."
        )
    return total // 6


def vae_config(vae: Tensors, latent_scale: float) -> dict[str, Any]:
    """The `AutoencoderKL` configuration of VAE tensors in diffusers spelling. Raises ModelError when none fits."""
    levels, layers = vae_size(vae)
    if not levels:
        raise ModelError("VAE: no encoder was found; a VAE of Stable Diffusion has encoder and decoder.")
    return {
        "in_channels": _shape(vae, "encoder.conv_in.weight")[1],
        "out_channels": _shape(vae, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(vae, "decoder.conv_in.weight")[1],
        "block_out_channels": [
            _shape(vae, f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)
        ],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": GROUPS,
        "scaling_factor": latent_scale,
    }


def text_config(text: Tensors, activation: str) -> dict[str, Any]:
    """The `CLIPTextConfig` values of text-encoder tensors in the one spelling."""
    vocabulary, width = _shape(text, "embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(text, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": layer_count(text),
        "num_attention_heads": heads_of(width),
        "max_position_embeddings": _shape(text, "embeddings.position_embedding.weight")[0],
        "hidden_act": activation,
        "projection_dim": side(text, "text_projection.weight", 0) if "text_projection.weight" in text else width,
    }


def context_width(unet: Tensors) -> int:
    """The width of the text that a UNet reads. Raises ModelError."""
    name = next((name for name in unet if name.endswith("attn2.to_k.weight")), None)
    if name is None:
        raise ModelError("UNet: no cross-attention (attn2) was found; it does not read text.")
    return side(unet, name, 1)


def side(tensors: Tensors, name: str, axis: int) -> int:
    """The size of a matrix or convolution along its outputs (0) or inputs (1). Raises ModelError when it is none."""
    return _shape(tensors, name)[axis]


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of a matrix or convolution. Raises ModelError when it is missing, or something else."""
    if name not in tensors:
        raise ModelError(f"the tensor {name} is missing; the file is incomplete or of another architecture.")
    shape = tuple(tensors[name].shape)
    if len(shape) not in (2, 4) or 0 in shape:
        raise ModelError(f"the tensor {name} has the shape {list(shape)}, which is no layer's; the file is damaged.")
    return shape
