"""Stable Diffusion 2.x: OpenCLIP ViT-H (its penultimate layer), linear projections around the attention, ε or v."""

from __future__ import annotations

from ..family import FAMILIES, PAD_ZERO, Family, TextRow, unet_blocks

SD2 = FAMILIES.register("sd2")(
    Family(
        name="sd2",
        label="Stable Diffusion 2.x",
        base_version="sd_v2",
        v_base_version="sd_v2_v",
        key_style="diffusers",
        latent_scale=0.18215,
        texts=(
            TextRow(
                "te1",
                "lora_te",
                "clip_h",
                ("cond_stage_model.transformer.", "cond_stage_model.model."),
                "text_encoder",
                "gelu",
                PAD_ZERO,
                drop_last=True,
            ),
        ),
        sizes=False,
        matches=lambda facts: facts.linear and not facts.sizes,
        blocks=unet_blocks(12),
        often_v=True,
    )
)
