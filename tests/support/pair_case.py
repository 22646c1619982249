"""Pairs of the painted world for tests: files, folders, and the job of a pair mode on a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import engine_case
import numpy as np
import tiny
from PIL import Image

from trainer.demo import world

BEFORE = world.Scene("circle", "red", "white", "small", "left")
AFTER = dataclasses.replace(BEFORE, background="black")


def picture(scene: world.Scene, seed: int = 1) -> np.ndarray:
    """One picture of a scene; the same seed gives the same place and tone."""
    return world.render([scene], np.random.default_rng(seed))[0]


def write_pair(folder: Path, before=BEFORE, after=AFTER, name: str = "a", suffix: str = "_t", seed: int = 1) -> None:
    """`<name>.png` and `<name><suffix>.png` with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    for end, scene in (("", before), (suffix, after)):
        Image.fromarray(picture(scene, seed)).save(folder / f"{name}{end}.png")
        (folder / f"{name}{end}.txt").write_text(world.caption(scene), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class PairCase(engine_case.Case):
    """The folders of a test; `pictures` holds the pairs a and b."""

    def settings(self, **changes: object) -> dict[str, object]:
        given: dict[str, object] = {
            "mode": "ADDifT",
            "original image": str(self.pictures / "a.png"),
            "target image": str(self.pictures / "a_t.png"),
            "original prompt": "a circle",
            "train_batch_size": 1,
            "train_iterations": 4,
            "data_cache": "memory",
            **changes,
        }
        settings = super().settings(**given)
        if given["mode"] == "Multi-ADDifT":
            settings = {"diff_target_name": "_t", **settings}
            unused = ("original image", "target image", "original prompt")
        else:
            unused = ("lora_data_directory", "image_size(height, width)", "image_min_length", "image_buckets_step")
        for key in unused:
            settings.pop(key)
        return settings


def make(root: Path, kind: str = "sd1", prediction: str = "epsilon") -> PairCase:
    """Write model and pairs below `root`."""
    tiny.folder(kind, root / "base", prediction=prediction)
    write_pair(root / "pictures")
    write_pair(root / "pictures", BEFORE, dataclasses.replace(AFTER, size="large"), name="b", seed=2)
    return PairCase(root, root / "base", root / "pictures")
