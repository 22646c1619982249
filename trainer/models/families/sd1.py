"""Stable Diffusion 1.x: CLIP-L, convolutions around the attention."""

from __future__ import annotations

from ..family import FAMILIES, PAD_EOS, Family, TextRow, unet_blocks

SD1 = FAMILIES.register("sd1")(
    Family(
        name="sd1",
        label="Stable Diffusion 1.x",
        base_version="sd_v1",
        v_base_version="sd_v1_v",
        key_style="diffusers",
        latent_scale=0.18215,
        texts=(
            TextRow(
                "te1",
                "lora_te",
                "clip_l",
                ("cond_stage_model.transformer.", "cond_stage_model.model."),
                "text_encoder",
                "quick_gelu",
                PAD_EOS,
            ),
        ),
        sizes=False,
        matches=lambda facts: not facts.linear and not facts.sizes,
        blocks=unet_blocks(12),
    )
)
