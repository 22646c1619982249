"""Stable Diffusion XL: CLIP-L and OpenCLIP bigG side by side, size conditioning."""

from __future__ import annotations

from ..family import FAMILIES, PAD_EOS, PAD_ZERO, Family, TextRow, unet_blocks

SDXL = FAMILIES.register("sdxl")(
    Family(
        name="sdxl",
        label="Stable Diffusion XL",
        base_version="sdxl_base_v1-0",
        v_base_version="sdxl_base_v1-0",
        key_style="sgm",
        latent_scale=0.13025,
        texts=(
            TextRow(
                "te1",
                "lora_te1",
                "clip_l",
                ("conditioner.embedders.0.transformer.",),
                "text_encoder",
                "quick_gelu",
                PAD_EOS,
                least_skip=2,
                final_norm=False,
            ),
            TextRow(
                "te2",
                "lora_te2",
                "clip_g",
                ("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."),
                "text_encoder_2",
                "gelu",
                PAD_ZERO,
                least_skip=2,
                final_norm=False,
                pooled=True,
            ),
        ),
        sizes=True,
        matches=lambda facts: facts.linear and facts.sizes and set(facts.encoders) == {"te1", "te2"},
        blocks=unet_blocks(9),
    )
)
