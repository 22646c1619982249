"""Distances between predictions and targets, per sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

DISTANCES: dict[str, Callable[..., Tensor]] = {
    "MSE": F.mse_loss,
    "L1": F.l1_loss,
    "Smooth-L1": F.smooth_l1_loss,
}


def distance(name: str, predicted_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean distance per sample, (B,) float32. A mask weights the elements and is normalised by its own mean."""
    loss = DISTANCES[name](predicted_BCHW.float(), target_BCHW.float(), reduction="none")
    if mask_B1HW is not None:
        loss = loss * (mask_B1HW / mask_B1HW.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6))
    return loss.flatten(1).mean(1)
