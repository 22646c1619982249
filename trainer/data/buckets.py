"""Buckets: the sizes pictures are brought to, which picture goes where, and which part of it stays.

Buckets, pictures and resized pictures are (width, height) in pixels; crop offsets are (top, left).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .settings import PIXELS_PER_LATENT, ImageSettings

Size = tuple[int, int]


def full_buckets(settings: ImageSettings) -> tuple[Size, ...]:
    """The buckets that use the whole area: the square of the short side and, per width, the tallest that fits.

    As in TrainTrain the height is a multiple of the step before it is cut to the long side. Ordered by aspect ratio.
    Raises JobError when the settings cannot be used.
    """
    settings.check()
    short, long = sorted(settings.size)
    found = {(short, short)}
    for width in _grid(settings):
        height = min(long, short * long // width // settings.buckets_step * settings.buckets_step)
        if height and _ratio_allowed((width, height), settings.max_ratio):
            found |= {(width, height), (height, width)}
    return _ordered(found)


def shrink_buckets(settings: ImageSettings) -> tuple[Size, ...]:
    """The smaller buckets that sub-images go to: every other pair of lengths on the grid within area and ratio.

    Ordered by aspect ratio, larger first. Raises JobError when the settings cannot be used.
    """
    full = set(full_buckets(settings))
    area = settings.size[0] * settings.size[1]
    grid = _grid(settings)
    pairs = {(width, height) for width in grid for height in grid if width * height <= area}
    return _ordered({pair for pair in pairs - full if _ratio_allowed(pair, settings.max_ratio)})


def own_bucket(size: Size) -> Size:
    """The picture's own size, less what does not fill a latent; one latent at least."""
    width, height = (max(side // PIXELS_PER_LATENT, 1) * PIXELS_PER_LATENT for side in size)
    return width, height


def nearest(size: Size, buckets: Sequence[Size], count: int = 1) -> tuple[Size, ...]:
    """The `count` buckets whose width / height is nearest to that of `size`, nearest first; fewer if it must be."""
    ratio = size[0] / size[1]
    return tuple(heapq.nsmallest(count, buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio)))


def would_enlarge(size: Size, bucket: Size) -> bool:
    """Whether a picture of `size` has to be enlarged to cover `bucket`."""
    return size[0] < bucket[0] or size[1] < bucket[1]


@dataclass(frozen=True)
class Placement:
    """How a picture of `size` fills `bucket`: resized to `resized` in its ratio, mirrored if `flipped`, then cropped.

    `crop` is (top, left) in pixels of the resized (and mirrored) picture.
    """

    size: Size
    bucket: Size
    resized: Size
    crop: tuple[int, int]
    flipped: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part that stays, as (left, top, right, bottom) in pixels of the unresized, unmirrored picture."""
        top, left = self.crop
        if self.flipped:
            left = self.resized[0] - self.bucket[0] - left
        across, down = self.size[0] / self.resized[0], self.size[1] / self.resized[1]
        right, bottom = (left + self.bucket[0]) * across, (top + self.bucket[1]) * down
        return left * across, top * down, min(right, float(self.size[0])), min(bottom, float(self.size[1]))


def place(size: Size, bucket: Size, flipped: bool = False) -> Placement:
    """The centre crop of a picture of `size` that fills `bucket`."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    top, left = (resized[1] - bucket[1]) // 2, (resized[0] - bucket[0]) // 2
    if flipped:
        left = resized[0] - bucket[0] - left
    return Placement(size, bucket, resized, (top, left), flipped)


def placements(
    size: Size, settings: ImageSettings, full: Sequence[Size], shrink: Sequence[Size]
) -> tuple[Placement, ...]:
    """Everything one picture of `size` gives: its full bucket, then its sub-images, each followed by its mirror image.

    `full` and `shrink` are the buckets of the settings. Empty when nothing remains without enlarging and that is off.
    """
    buckets = nearest(size, full) + (nearest(size, shrink, settings.sub_images) if settings.sub_images else ())
    kept = [bucket for bucket in buckets if not (settings.disable_upscale and would_enlarge(size, bucket))]
    flips = (False, True) if settings.mirroring else (False,)
    return tuple(place(size, bucket, flipped) for bucket in kept for flipped in flips)


def _grid(settings: ImageSettings) -> range:
    return range(settings.min_length, max(settings.size) + 1, settings.buckets_step)


def _ratio_allowed(bucket: Size, max_ratio: float) -> bool:
    return 1 / max_ratio <= bucket[0] / bucket[1] <= max_ratio  # as TrainTrain rounds it


def _ordered(buckets: set[Size]) -> tuple[Size, ...]:
    return tuple(sorted(buckets, key=lambda bucket: (bucket[0] / bucket[1], -bucket[0])))
