"""Pairs of images before a run: both sides as they will be cut, where they differ, and the bucket they fall into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import Item, arrange
from ..data.images import decode as decode_picture
from ..data.images import fit, picture_bytes
from ..data.pairs import DIFFERENT, PairScan
from ..data.scan import Picture
from ..engine.arguments import find_pair_data, folder, pair_settings
from ..errors import DataError
from ..modes.base import MODES
from ..params.core import Task
from ..params.job import Job
from .picture_files import read_picture

MOST = 6
EDGE = 384
"""Pixels of the longer side of what is shown."""
RED_RGB = (230, 40, 40)


@dataclass(frozen=True)
class PairView:
    """One pair as it is shown: file names, both images, the original in grey with what differs in red (None when the
    two cannot be compared), its share of the pixels, and the sizes (width, height) of file and bucket.
    """

    names: tuple[str, str]
    original: Image.Image | None
    target: Image.Image | None
    difference: Image.Image | None = None
    share: float | None = None
    size: tuple[int, int] | None = None
    bucket: tuple[int, int] | None = None


def pair_views(job: Job) -> tuple[list[PairView], int, str]:
    """The first pairs of a job, how many there are, and what is wrong with them as a sentence, "" when nothing is."""
    task = job[Task]
    files = "pictures" in MODES.get(task.mode).needs
    if files and not (task.original_image.strip() and task.target_image.strip()):
        return _single(job), 0, ""
    try:
        found = find_pair_data(job)
        originals = arrange(found.originals.pictures, pair_settings(job)).items
    except DataError as fault:
        return _single(job) if files else [], 0, str(fault)
    partner = {one.name: other for one, other in zip(found.originals.pictures, found.targets.pictures, strict=True)}
    seen: dict[str, Item] = {}
    for item in originals:  # one picture can be cut in several ways
        seen.setdefault(item.picture.name, item)
    return [_view(item, partner[name]) for name, item in list(seen.items())[:MOST]], _count(found), ""


def _count(found: PairScan) -> int:
    return len(found.originals.pictures)


def _view(item: Item, target: Picture) -> PairView:
    sides_CHW = [
        fit(*decode_picture(picture_bytes(path)), item.placement)[0] for path in (item.picture.path, target.path)
    ]
    different_HW = (sides_CHW[0] - sides_CHW[1]).abs().sum(0).mul(127.5).gt(DIFFERENT)
    grey_HW = sides_CHW[0].mean(0).add(1).mul(127.5 * 0.5).add(100)
    red_CHW = torch.tensor(RED_RGB, dtype=torch.float32).view(3, 1, 1)
    marked_CHW = torch.where(different_HW, red_CHW, grey_HW)
    return PairView(
        (item.picture.name, target.name),
        _image(sides_CHW[0].add(1).mul(127.5)),
        _image(sides_CHW[1].add(1).mul(127.5)),
        _image(marked_CHW),
        float(different_HW.float().mean()),
        item.picture.size,
        item.bucket,
    )


def _image(picture_CHW: Tensor) -> Image.Image:
    """A picture of values 0..255, small."""
    pixels_HWC = picture_CHW.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return _small(Image.fromarray(pixels_HWC.numpy()))


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((EDGE, EDGE))
    return picture


def _single(job: Job) -> list[PairView]:
    """The two images that a job names, each as far as it can be read, when they make no pair."""
    task = job[Task]
    paths = [folder(one) if one.strip() else None for one in (task.original_image, task.target_image)]
    shown = [_readable(path) for path in paths]
    return [PairView((_name(paths[0]), _name(paths[1])), shown[0], shown[1])]


def _name(path: Path | None) -> str:
    return "" if path is None else path.name


def _readable(path: Path | None) -> Image.Image | None:
    try:
        return None if path is None else _small(read_picture(path).convert("RGB"))
    except DataError:
        return None
