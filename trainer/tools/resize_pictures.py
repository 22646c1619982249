"""Training pictures at several resolutions: each made from the original, never enlarged, cut to multiples.

After the multi-resolution script of sd-scripts, with its file names; unlike there a smaller picture is not made from
the one that was shrunk before, so the order of the resolutions does not matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import JobError, Problem
from .picture_files import companions, copy_file, pictures_of, read_picture, save_picture

INTERPOLATIONS: dict[str, Image.Resampling] = {
    "area": Image.Resampling.BOX,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos4": Image.Resampling.LANCZOS,
}
"""Names of sd-scripts → Pillow's filters, all of which average when they shrink."""

_RESOLUTION = re.compile(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", re.IGNORECASE)
LARGEST_SIDE = 16384


@dataclass(frozen=True)
class ResizeSettings:
    """`resolutions` are (width, height) in pixels, of which the area counts. `divisible`: what sides are cut to."""

    resolutions: tuple[tuple[int, int], ...]
    divisible: int = 8
    interpolation: str = "area"
    png: bool = False
    associated: bool = True


def parse_resize(
    resolutions: str, divisible: str = "8", interpolation: str = "area", png: bool = False, associated: bool = True
) -> ResizeSettings:
    """Settings as they are typed. Raises JobError with all problems."""
    problems = []
    sizes, parts = [], [part.strip() for part in resolutions.split(",") if part.strip()]
    for part in parts or [""]:
        match = _RESOLUTION.fullmatch(part)
        if match and all(1 <= int(side) <= LARGEST_SIDE for side in match.groups()):
            sizes.append((int(match[1]), int(match[2])))
        else:
            problems.append(Problem("resolutions", part, "must be width x height in pixels, as in 512x512,384x384."))
    if len(set(sizes)) < len(sizes):
        problems.append(Problem("resolutions", resolutions, "names the same resolution twice; keep one."))
    step = int(divisible) if re.fullmatch(r"\d{1,4}", divisible.strip()) else 0
    if not 1 <= step <= 1024:
        problems.append(Problem("divisible", divisible, "must be a whole number from 1 to 1024; 8 fits all models."))
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        problems.append(Problem("interpolation", interpolation, f"is not known. Known: {known}."))
    if problems:
        raise JobError(problems)
    return ResizeSettings(tuple(sizes), step, interpolation, png, associated)


def shrunk_size(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture scaled down, keeping its ratio, until its area is that of the resolution; its own
    size when it is not larger."""
    area, most = size[0] * size[1], resolution[0] * resolution[1]
    if area <= most:
        return size
    scale = math.sqrt(most / area)
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def cut_size(size: tuple[int, int], divisible: int) -> tuple[int, int]:
    """The largest size inside `size` whose sides are multiples; a side shorter than one multiple stays as it is."""
    width, height = (side - side % divisible or side for side in size)
    return width, height


def resized(picture: Image.Image, resolution: tuple[int, int], settings: ResizeSettings) -> Image.Image:
    """The picture at one resolution, its middle kept where the edges are cut."""
    size = shrunk_size(picture.size, resolution)
    if size != picture.size:
        picture = picture.resize(size, INTERPOLATIONS[settings.interpolation])
    width, height = cut_size(size, settings.divisible)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return picture.crop((left, top, left + width, top + height)) if (width, height) != size else picture


def name_at(path: Path, resolution: tuple[int, int], png: bool) -> str:
    """The file name at a resolution: `cat.jpg` → `cat+512x512.jpg`."""
    return f"{path.stem}+{resolution[0]}x{resolution[1]}{'.png' if png else path.suffix}"


def resize_pictures(
    source: Path, target: Path, settings: ResizeSettings, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write every picture of a folder (or one picture) at every resolution into `target`; returns the new pictures.

    Raises DataError; what was written until then stays.
    """
    found = pictures_of(source)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for number, path in enumerate(found):
        picture = read_picture(path)
        for resolution in settings.resolutions:
            new = target / name_at(path, resolution, settings.png)
            save_picture(resized(picture, resolution, settings), new)
            written.append(new)
            for other in companions(path) if settings.associated else ():
                copy_file(other, new.with_suffix(other.suffix))
        if progress:
            progress(number + 1, len(found))
    return written
