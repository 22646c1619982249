"""LoRA: the denoising loss on a folder of captioned pictures (Hu et al. 2106.09685; Ho et al. 2006.11239, eq. 14)."""

from __future__ import annotations

from torch import Tensor

from .base import MODES, Batch, Kit, Mode


@MODES.register("LoRA")
class LoRA(Mode):
    """Learns from a folder of pictures with captions."""

    help = "Learns a character, style or thing from a folder of images with captions."
    needs = frozenset({"folder", "size", "trigger", "resume", "te_rate", "run"})
    source = "pictures"

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """‖prediction(x_t, t, c) − target‖² per sample."""
        latents, noise, t = kit.latents(batch), kit.noise(batch), kit.timesteps(batch)
        x = kit.process.add_noise(latents, noise, t)
        predicted = kit.predict(x, t, kit.text(batch.prompts), batch.time_ids)
        return kit.loss(predicted, kit.process.target(latents, noise, t), t, batch.mask)
