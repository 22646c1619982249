"""Reads the attributes of a painted picture by statistics alone; every attribute may come back unreadable (None)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import world

GROUND_TOLERANCE = 40.0  # RGB distance of the border from the nearest background's grey
COLOUR_TOLERANCE = 60.0  # RGB distance of the shape from the nearest palette entry
CONTRAST = 45.0  # RGB distance from the background at which a pixel certainly belongs to something
LEAST_OVERLAP = 0.70  # intersection over union with the best template below which a shape is unreadable
SIZE_BORDER = 11.5  # radius in pixels between small and large
RADII = (5.5, 19.0)  # a radius outside this range is no size of this world


@dataclass(frozen=True)
class Reading:
    """What the reader saw; None means unreadable. `overlap` is the best template's intersection over union."""

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    side: str | None
    overlap: float


def read(pictures: np.ndarray) -> list[Reading]:
    """Read uint8 pictures `N x 64 x 64 x 3`; raises ValueError on any other array."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (world.EDGE, world.EDGE, 3):
        raise ValueError(f"read: pictures are {pictures.dtype} {pictures.shape}; uint8 (N, 64, 64, 3) is expected")
    pixels = pictures.astype(np.float32)
    ground = border_median(pixels)
    colour, alpha = separate(pixels, ground)
    shape, overlap, radius = fit(alpha)
    side, palette = sides(alpha), world.palette()
    greys = {name: (level,) * 3 for name, level in world.BACKGROUNDS.items()}
    result = []
    for n in range(len(pixels)):
        found = overlap[n] >= LEAST_OVERLAP
        size = (
            None
            if not found or not RADII[0] <= radius[n] <= RADII[1]
            else ("small" if radius[n] < SIZE_BORDER else "large")
        )
        result.append(
            Reading(
                shape[n] if found else None,
                nearest(colour[n], palette, COLOUR_TOLERANCE),
                nearest(ground[n], greys, GROUND_TOLERANCE),
                size,
                side[n],
                float(overlap[n]),
            )
        )
    return result


def nearest(value: np.ndarray, table: dict[str, tuple], tolerance: float) -> str | None:
    """The name of the table's nearest colour; None where it is farther than `tolerance` or `value` is not a number."""
    if not np.isfinite(value).all():
        return None
    distances = np.linalg.norm(np.array(list(table.values()), np.float32) - value, axis=1)
    return list(table)[int(distances.argmin())] if distances.min() <= tolerance else None


def border_median(pixels: np.ndarray) -> np.ndarray:
    """Median colour `N x 3` of the outermost two rows and columns of `N x 64 x 64 x 3`."""
    rim = np.zeros(pixels.shape[1:3], bool)
    rim[:2], rim[-2:], rim[:, :2], rim[:, -2:] = True, True, True, True
    return np.median(pixels[:, rim], axis=1)


def separate(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shape's colour `N x 3` (NaN where there is no shape) and its coverage `N x 64 x 64` in 0..1."""
    difference = pixels - ground[:, None, None]
    distance = np.linalg.norm(difference, axis=-1)
    colour = np.full((len(pixels), 3), np.nan, np.float32)
    alpha = np.zeros(distance.shape, np.float32)
    for n, far in enumerate(distance):
        mask = far > CONTRAST
        core = erode(mask)
        core = core if core.sum() >= 6 else mask
        if core.sum() < 6:
            continue
        colour[n] = np.median(pixels[n][core], axis=0)
        axis = colour[n] - ground[n]
        alpha[n] = np.clip(difference[n] @ axis / max(float(axis @ axis), 1.0), 0.0, 1.0)
    alpha[alpha < 0.25] = 0.0  # faint clouds in the background are no part of a shape
    return colour, alpha


def erode(mask: np.ndarray) -> np.ndarray:
    """The pixels of a `64 x 64` mask whose four neighbours belong to it too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def moments(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area in pixels and centroid x, y in pixels of coverages `N x 64 x 64`, each `N` (area at least 1)."""
    grid = np.arange(world.EDGE, dtype=np.float32) + 0.5
    area = np.maximum(alpha.sum(axis=(1, 2)), 1.0)
    return area, (alpha.sum(axis=1) @ grid) / area, (alpha.sum(axis=2) @ grid) / area


def fit(alpha: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Best shape, its soft intersection over union and its radius in pixels, for coverages `N x 64 x 64`.

    Each template gets the radius and place that give it the picture's area and centroid, and is tried sharp and soft:
    a blurred cross is nearer to a sharp lozenge than to a sharp cross.
    """
    area, x, y = moments(alpha)
    overlaps, radii = [], []
    for shape in world.shapes():
        unit_area, offset = unit_moments(shape)
        radius = np.clip(np.sqrt(area / unit_area), 1.0, world.EDGE)
        template = world.coverage(shape, x, y - offset * radius, radius)
        sharp, blurred = (intersection_over_union(tried, alpha) for tried in (template, soft(template)))
        overlaps.append(np.maximum(sharp, blurred))
        radii.append(radius)
    overlap, radius = np.stack(overlaps, axis=1), np.stack(radii, axis=1)
    best, rows = overlap.argmax(axis=1), np.arange(len(alpha))
    return [world.shapes()[i] for i in best], overlap[rows, best], radius[rows, best]


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Soft intersection over union of coverages `N x 64 x 64`, each `N`."""
    union = np.maximum(one, other).sum(axis=(1, 2))
    return np.minimum(one, other).sum(axis=(1, 2)) / np.maximum(union, 1.0)


def soft(coverage: np.ndarray) -> np.ndarray:
    """Coverages `N x 64 x 64` blurred by the binomial filter 1 2 1 along both axes: about 0.7 pixels."""
    for axis in (1, 2):
        coverage = (np.roll(coverage, 1, axis) + 2 * coverage + np.roll(coverage, -1, axis)) / 4
    return coverage


def unit_moments(shape: str) -> tuple[float, float]:
    """Area over radius squared, and the centroid's y offset over the radius, measured on a large rendering."""
    radius = 24.0
    one = np.ones(1, np.float32)
    area, _, y = moments(world.coverage(shape, one * 32, one * 32, one * radius))
    return float(area[0]) / radius**2, (float(y[0]) - 32.0) / radius


def sides(alpha: np.ndarray) -> list[str | None]:
    """`left` or `right` by the centroid; None in the middle (2 pixels either way) or where there is nothing."""
    _, x, _ = moments(alpha)
    empty = alpha.sum(axis=(1, 2)) < 6
    middle = np.abs(x - world.EDGE / 2) < 2.0
    return [
        None if unclear else "left" if place < world.EDGE / 2 else "right"
        for unclear, place in zip(empty | middle, x, strict=True)
    ]


def score(scenes: list[world.Scene], readings: list[Reading]) -> dict[str, float]:
    """Share of right readings for each attribute, and `all` for pictures with every attribute right."""
    right = {
        name: [getattr(s, name) == getattr(r, name) for s, r in zip(scenes, readings, strict=True)]
        for name in world.ATTRIBUTES
    }
    result = {name: float(np.mean(values)) for name, values in right.items()}
    return {**result, "all": float(np.mean(np.all(list(right.values()), axis=0)))}
