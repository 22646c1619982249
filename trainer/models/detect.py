"""Telling a usable single file from everything else, with an error that says what was recognised."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import ModelError, brief

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
SUPPORTED = "Supported are Stable Diffusion 1.x, 2.x and XL"

_RECOGNISED = (
    (
        "a LoRA (or LyCORIS) file",
        r"(^|[._])(lora_(down|up|mid|A|B)\.|hada_w1_|lokr_w[12]|oft_blocks|lora_linear_layer)|\.(dora_scale|on_input)$",
    ),
    ("a textual inversion embedding", r"^(emb_params|string_to_param|clip_[lg])$"),
    (
        "a ControlNet",
        r"^(control_model|controlnet_cond_embedding|input_hint_block|zero_convs|controlnet_down_blocks)\.",
    ),
    ("Stable Diffusion 3", r"(^|\.)joint_blocks\.\d+\."),
    ("Flux (or Chroma)", r"(^|\.)(double_blocks|single_blocks)\.\d+\.|single_transformer_blocks\.\d+\."),
    ("AuraFlow", r"(^|\.)double_layers\.\d+\."),
    ("PixArt", r"(^|\.)(adaln_single|t_block)\."),
    ("Lumina 2 or Z-Image", r"(^|\.)(noise_refiner|context_refiner|cap_embedder)\."),
    ("Qwen-Image", r"transformer_blocks\.\d+\.img_mod\."),
    ("Hunyuan DiT", r"(^|\.)(mlp_t5|text_states_proj)\."),
    ("Wan", r"(^|\.)blocks\.\d+\.cross_attn\."),
    ("Stable Cascade", r"(^|\.)(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)\."),
)
_PARTS = (
    ("a UNet in diffusers spelling, without text encoder", r"^(unet\.)?down_blocks\.\d+\.resnets\."),
    (
        "a VAE alone (give it as the VAE, not as the model)",
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|down|up)",
    ),
    ("a text encoder alone", r"^(text_model\.|transformer\.(resblocks|text_model)\.|encoder\.(layers|block)\.\d+)"),
)
_CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model", 7: "a ×4 upscaler"}


def refuse_unsupported(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ModelError, saying what was recognised, unless the tensors are a Stable Diffusion checkpoint in LDM/sgm
    spelling."""
    for label, pattern in _RECOGNISED:
        found = _first(tensors, pattern)
        if found:
            raise ModelError(
                f"{where}: this is {label} (it has the tensor {found}), not a base model we can train. {SUPPORTED}."
            )
    entry = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if entry is None:
        for label, pattern in _PARTS:
            found = _first(tensors, pattern)
            if found:
                raise ModelError(
                    f"{where}: this is {label} (it has the tensor {found}). {SUPPORTED}, "
                    "as a whole checkpoint or a diffusers folder."
                )
        some = ", ".join(list(tensors)[:3]) or "none at all"
        raise ModelError(f"{where}: the architecture is not known (its first tensors: {some}). {SUPPORTED}.")
    refuse_channels(entry.shape[1] if entry.ndim == 4 else list(entry.shape), where)
    if any(name.startswith("conditioner.embedders.0.model.") for name in tensors):
        raise ModelError(f"{where}: this is the SDXL refiner; train on the SDXL base model. {SUPPORTED}.")
    if any(name.startswith("embedder.model.visual.") for name in tensors):
        raise ModelError(f"{where}: this is an unCLIP model, which takes images as input. {SUPPORTED}.")


def refuse_channels(channels: object, where: str) -> None:
    """Raise ModelError when the UNet takes anything beside four latent channels."""
    if channels != 4:
        what = _CHANNELS.get(channels, "another architecture") if isinstance(channels, int) else "another architecture"
        raise ModelError(
            f"{where}: the UNet takes {brief(channels)} channels, so this is {what}; a base model takes 4. {SUPPORTED}."
        )


def _first(tensors: Mapping[str, Tensor], pattern: str) -> str | None:
    search = re.compile(pattern).search
    return next((name for name in tensors if search(name)), None)
