"""Before and after: what an adapter changed in the painted world, as numbers and as a grid of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..adapters.network import Network
from ..engine.samples import SampleSettings, sample, to_pil
from ..models.base import Model
from . import world
from .measure import Rate, agreement, ask, share

SETTINGS = SampleSettings(size=(world.EDGE, world.EDGE), steps=12, cfg=2.0, seed=20_000, batch_size=50)
UNRELATED_FALL = 0.05


@dataclass(frozen=True)
class Effect:
    """How often prompts with the new word show its shape, and how often unrelated prompts show what they ask, before
    and after.
    """

    asked_before: Rate
    asked_after: Rate
    unrelated_before: dict[str, Rate]
    unrelated_after: dict[str, Rate]

    @property
    def worst_fall(self) -> float:
        """The largest fall of any attribute over the unrelated prompts, 0..1."""
        return max(self.unrelated_before[name].value - self.unrelated_after[name].value for name in world.ATTRIBUTES)

    def as_dict(self) -> dict[str, object]:
        """Plain values for one line of JSON."""
        return {
            "asked_before": self.asked_before.as_dict(),
            "asked_after": self.asked_after.as_dict(),
            "unrelated_before": {name: rate.as_dict() for name, rate in self.unrelated_before.items()},
            "unrelated_after": {name: rate.as_dict() for name, rate in self.unrelated_after.items()},
            "worst_fall": round(self.worst_fall, 4),
        }


def concept_scenes(count: int, seed: int = 7) -> list[world.Scene]:
    """Random scenes of the held-out shape; the pictures a demo learns from are not among the things compared."""
    rng = np.random.default_rng(seed)
    base = world.draw_scenes(count, rng, "open")
    return [dataclasses.replace(scene, shape=world.HELD_OUT_SHAPE) for scene in base]


def unrelated_scenes(count: int, seed: int = 8) -> list[world.Scene]:
    """Random scenes of words the base model knows."""
    return world.draw_scenes(count, np.random.default_rng(seed), "base")


def measure_effect(model: Model, network: Network, asked: int = 100, unrelated: int = 200) -> Effect:
    """Sample and read both sets of prompts with the adapter at strength 0 and 1 (the same noise for both)."""
    concept, others = concept_scenes(asked), unrelated_scenes(unrelated)
    found: dict[float, tuple[Rate, dict[str, Rate]]] = {}
    for strength in (0.0, 1.0):
        with network.at_strength(strength):
            shown = ask(model, [world.caption(scene) for scene in concept], SETTINGS)
            kept = ask(model, [world.caption(scene) for scene in others], SETTINGS)
        found[strength] = share(reading.shape == world.HELD_OUT_SHAPE for reading in shown), agreement(others, kept)
    return Effect(found[0.0][0], found[1.0][0], found[0.0][1], found[1.0][1])


def comparison(
    model: Model, network: Network, prompts: Sequence[str], strengths: Sequence[float], settings: SampleSettings
) -> Tensor:
    """Pictures (prompts, strengths, 3, H, W) in [−1, 1]; each prompt has the same noise at every strength."""
    columns = []
    for strength in strengths:
        with network.at_strength(strength):
            columns.append(sample(model, prompts, settings))
    return torch.stack(columns, 1)


def grid(pictures: Tensor, rows: Sequence[str], columns: Sequence[str], scale: int = 2) -> Image.Image:
    """A labelled grid of pictures (rows, columns, 3, H, W) in [−1, 1], each enlarged `scale` times."""
    height, width = pictures.shape[-2] * scale, pictures.shape[-1] * scale
    left, top, gap = 12 + max(7 * max(map(len, rows)), 40), 26, 6
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((left + column * (width + gap) + 2, 8), label, fill=(30, 30, 30))
    for row, label in enumerate(rows):
        y = top + row * (height + gap)
        draw.text((8, y + height // 2 - 6), label, fill=(30, 30, 30))
        for column in range(len(columns)):
            picture = to_pil(pictures[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (width + gap), y))
    return sheet


def demo_grid(model: Model, network: Network, path: Path) -> Path:
    """Write the before/after grid of the demo: three prompts with the new word, three without."""
    asked = [world.caption(scene) for scene in concept_scenes(3, seed=70)]
    kept = [world.caption(scene) for scene in unrelated_scenes(3, seed=80)]
    pictures = comparison(model, network, [*asked, *kept], (0.0, 0.5, 1.0), SETTINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, [*asked, *kept], ("before", "strength 0.5", "strength 1")).save(path)
    return path
