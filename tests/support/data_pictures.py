"""Helpers of the data tests: real picture files, and an encoder that can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from trainer.data.images import decode, picture_bytes


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of random pixels, (width, height)."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    bands = [
        Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(levels.reshape(*shape[:2], channels), 2, 0)
    ]
    return bands[0] if channels == 1 else Image.merge(mode, bands)


def load_rgb(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole picture as `rgb_CHW` in [-1, 1] and its transparency `mask_HW` in [0, 1], None if fully opaque."""
    rgb, mask = decode(picture_bytes(path))
    pixels = torch.from_numpy(np.array(rgb, np.float32)).permute(2, 0, 1) / 127.5 - 1
    return pixels, None if mask is None else torch.from_numpy(np.array(mask, np.float32)) / 255


def write(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, caption: str | None = None) -> Path:
    """Writes a random picture and, if given, its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(size, seed).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


class PoolingEncoder:
    """Stands for a VAE: the mean is the picture averaged over 8 × 8 pixels, the deviation 0.5. Counts its work."""

    def __init__(self) -> None:
        self.pictures = 0
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.pictures += len(pixels_BCHW)
        self.shapes.append(tuple(pixels_BCHW.shape))
        mean_BCHW = F.avg_pool2d(pixels_BCHW, 8)
        return mean_BCHW, torch.full_like(mean_BCHW, 0.5)
