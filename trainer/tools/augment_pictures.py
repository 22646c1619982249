"""Copies of a picture turned by random angles or shrunk on a transparent canvas, so that few pictures become more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.scan import CAPTION_TYPES
from ..errors import JobError, Problem
from .picture_files import companions, copy_file, pictures_of, read_picture, save_picture

SIDES = ("anywhere", "top", "bottom", "left", "right")
MOST_COPIES = 1000


@dataclass(frozen=True)
class AugmentSettings:
    """`angle`: the largest turn in degrees to either side. `scale`: the smallest factor a copy is shrunk by (1 = not).

    `side`: where the shrunk copy stays on its canvas. A copy depends on the seed, the picture's name and its number.
    """

    copies: int = 4
    angle: float = 30.0
    scale: float = 1.0
    side: str = "anywhere"
    seed: int = 1
    captions: bool = True


_BOUNDS: dict[str, tuple[type, float, float, str]] = {
    "copies": (int, 1, MOST_COPIES, f"must be a whole number from 1 to {MOST_COPIES}."),
    "angle": (float, 0, 180, "must be a number of degrees from 0 to 180."),
    "scale": (float, 0.01, 1, "must be a factor from 0.01 to 1; 1 does not shrink."),
    "seed": (int, 0, 2**63 - 1, "must be a whole number from 0."),
}


def parse_augment(numbers: dict[str, str], side: str = "anywhere", captions: bool = True) -> AugmentSettings:
    """Settings as they are typed: `numbers` are copies, angle, scale and seed. Raises JobError with all problems."""
    problems, values = [], {}
    for name, (kind, low, high, right) in _BOUNDS.items():
        typed = numbers.get(name, "").strip() or str(getattr(AugmentSettings, name))
        try:
            value = kind(typed)
        except (ValueError, OverflowError):
            value = low - 1
        values[name] = value
        if not low <= value <= high:
            problems.append(Problem(name, typed, right))
    if side not in SIDES:
        problems.append(Problem("side", side, f"is not known. Known: {', '.join(SIDES)}."))
    if not problems and not values["angle"] and values["scale"] == 1:
        right = "is 0 and the smallest scale is 1, so all copies would be the same; change one of them."
        problems.append(Problem("angle", numbers.get("angle", ""), right))
    if problems:
        raise JobError(problems)
    return AugmentSettings(**values, side=side, captions=captions)


def augmented(picture: Image.Image, name: str, number: int, settings: AugmentSettings) -> Image.Image:
    """Copy `number` of a picture as RGBA: turned on a canvas that holds all of it, then shrunk on a canvas of that
    size. What the picture does not cover is transparent."""
    chance = random.Random(f"{settings.seed}/{name}/{number}")
    picture = picture.convert("RGBA")
    if settings.angle:
        angle = chance.uniform(-settings.angle, settings.angle)
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    if settings.scale < 1:
        picture = _shrunk(picture, chance.uniform(settings.scale, 1), settings.side, chance)
    return picture


def _shrunk(picture: Image.Image, scale: float, side: str, chance: random.Random) -> Image.Image:
    width, height = (max(round(edge * scale), 1) for edge in picture.size)
    free_x, free_y = picture.width - width, picture.height - height
    left, top = chance.randint(0, free_x), chance.randint(0, free_y)
    left = {"left": 0, "right": free_x}.get(side, left)
    top = {"top": 0, "bottom": free_y}.get(side, top)
    canvas = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return canvas


def name_of(path: Path, number: int) -> str:
    """The file name of a copy; what stands before `_id_` is the caption when file names are taken as captions."""
    return f"{path.stem}_id_{number}.png"


def previews(source: Path, settings: AugmentSettings, most: int) -> Iterator[tuple[str, Image.Image]]:
    """Name and picture of the first copies, at most `most`, as they would be written. Raises DataError."""
    each = min(settings.copies, 4, most)
    for path in pictures_of(source)[: most // each]:
        picture = read_picture(path)
        for number in range(each):
            yield name_of(path, number), augmented(picture, path.stem, number, settings)


def augment_pictures(
    source: Path, target: Path, settings: AugmentSettings, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write the copies of every picture of a folder (or of one picture) into `target`; returns their paths.

    Raises DataError; what was written until then stays.
    """
    found = pictures_of(source)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for index, path in enumerate(found):
        picture = read_picture(path)
        for number in range(settings.copies):
            new = target / name_of(path, number)
            save_picture(augmented(picture, path.stem, number, settings), new)
            written.append(new)
            for caption in companions(path) if settings.captions else ():
                if caption.suffix.lower() in CAPTION_TYPES:
                    copy_file(caption, new.with_suffix(caption.suffix))
        if progress:
            progress(index + 1, len(found))
    return written
