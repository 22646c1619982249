"""What the data part is told: one plain record, made from the parameters by whoever builds the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import JobError, Problem

PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class ImageSettings:
    """How pictures are found, captioned and put in buckets. Lengths are in pixels, `size` is (height, width).

    With `own_size` every picture is its own bucket, and `size` and what follows from it are not used.
    """

    folder: Path
    trigger: str = ""
    size: tuple[int, int] = (512, 512)
    buckets_step: int = 256
    min_length: int = 512
    max_ratio: float = 2.0
    sub_images: int = 0
    mirroring: bool = False
    filename_as_tag: bool = False
    disable_upscale: bool = False
    multiply: int = 1
    skip_broken: bool = False
    own_size: bool = False

    def problems(self) -> tuple[Problem, ...]:
        """Every value that cannot be used, under its JSON key; empty when all is well."""
        found = [
            Problem(key, value, f"must be a positive multiple of {PIXELS_PER_LATENT} pixels")
            for key, value in (
                ("image_size(height, width)", self.size[0]),
                ("image_size(height, width)", self.size[1]),
                ("image_buckets_step", self.buckets_step),
                ("image_min_length", self.min_length),
            )
            if value <= 0 or value % PIXELS_PER_LATENT
        ]
        if self.folder == Path():  # what an empty field becomes; the folder the program was started in is never meant
            found.insert(0, Problem("lora_data_directory", str(self.folder), "give the folder that holds the images"))
        if not math.isfinite(self.max_ratio) or self.max_ratio < 1:
            found.append(Problem("image_max_ratio", self.max_ratio, "must be 1 (square images only) or more"))
        if self.sub_images < 0:
            found.append(Problem("sub_image_num", self.sub_images, "must be 0 (no sub-images) or more"))
        if self.multiply < 1:
            found.append(Problem("image_num_multiply", self.multiply, "must be 1 or more"))
        return tuple(dict.fromkeys(found))

    def check(self) -> None:
        """Raises JobError with every problem."""
        found = self.problems()
        if found:
            raise JobError(found)
