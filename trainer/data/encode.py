"""Latents of all items, encoded once: check every picture first, then encode what the cache does not hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..errors import DataError
from .buckets import Placement
from .cache import TensorCache, Tensors, fingerprint
from .images import BrokenPicture, decode, fit, picture_bytes
from .scan import Broken, Picture
from .text import Progress

EncodeImages = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
BACKGROUND = "white"  # under transparent pixels; part of the fingerprint


@dataclass(frozen=True)
class Pending:
    """One item whose latents are still to be encoded; `content` is the SHA-256 of the file it was checked with."""

    key: str
    picture: Picture
    placement: Placement
    content: str


@dataclass
class Checked:
    """Outcome of `check_pictures`: keys by picture, in the order of its placements; what to encode; what is broken; the
    names of those with transparent parts.
    """

    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    transparent: list[str] = field(default_factory=list)


def check_pictures(
    work: Sequence[tuple[Picture, tuple[Placement, ...]]], vae: str, cache: TensorCache, progress: Progress | None
) -> Checked:
    """Fingerprints all pictures and decodes those with anything to encode: all broken ones are known at once."""
    checked = Checked()
    seen: dict[str, bool] = {}
    """Key → whether it is of a picture with transparent parts."""
    for done, (picture, placements) in enumerate(work):
        if progress:
            progress("checking images", done, len(work))
        try:
            data = picture_bytes(picture.path)
            content = hashlib.sha256(data).hexdigest()
            keys = tuple(latents_key(content, placement, vae) for placement in placements)
            pending = []
            for key, placement in zip(keys, placements, strict=True):
                entry = None if key in seen else cache.get(key)
                if is_usable(entry, placement):
                    seen[key] = "mask" in (entry or ())
                elif key not in seen:
                    pending.append(Pending(key, picture, placement, content))
            if pending:
                _, mask_HW = fit(*decode(data), placements[0])
                seen.update((one.key, mask_HW is not None) for one in pending)
        except BrokenPicture as error:
            checked.broken.append(Broken(picture.name, str(error)))
            continue
        checked.keys[picture.name] = keys
        if any(seen[key] for key in keys):
            checked.transparent.append(picture.name)
        checked.pending += pending
    if progress:
        progress("checking images", len(work), len(work))
    return checked


def encode_pending(
    pending: Sequence[Pending], encode_images: EncodeImages, cache: TensorCache, progress: Progress | None
) -> None:
    """Encodes the items and enters them in the cache; what is done stays when this is interrupted.

    Each by itself: the last bits of a convolution depend on how many pictures it sees, and those of an item must not
    depend on which others are in the cache. Raises DataError when the VAE gives something unusable or a picture changed
    since it was checked.
    """
    for done, item in enumerate(pending):
        if progress:
            progress("encoding images", done, len(pending))
        _encode(item, encode_images, cache)
    if progress and pending:
        progress("encoding images", len(pending), len(pending))


def latents_key(content: str, placement: Placement, vae: str) -> str:
    """The fingerprint of an item's latents: the file's SHA-256, how it fills its bucket, and the VAE."""
    return fingerprint(
        kind="latents",
        content=content,
        bucket=placement.bucket,
        resized=placement.resized,
        crop=placement.crop,
        flipped=placement.flipped,
        background=BACKGROUND,
        vae=vae,
    )


def is_usable(tensors: Tensors | None, placement: Placement) -> bool:
    """Whether a cache entry has the tensors and shapes of this item's latents."""
    if tensors is None or not {"mean", "std"} <= set(tensors) <= {"mean", "std", "mask"}:
        return False
    mean_CHW, std_CHW = tensors["mean"], tensors["std"]
    if mean_CHW.dim() != 3 or mean_CHW.shape != std_CHW.shape:
        return False
    height, width = mean_CHW.shape[1:]
    mask_1HW = tensors.get("mask")
    if mask_1HW is not None and mask_1HW.shape != (1, height, width):
        return False
    return height > 0 and width > 0 and width * placement.bucket[1] == height * placement.bucket[0]


def _encode(item: Pending, encode_images: EncodeImages, cache: TensorCache) -> None:
    rgb_CHW, mask_HW = _load(item)
    with torch.no_grad():
        mean_BCHW, std_BCHW = encode_images(rgb_CHW[None])
    name = item.picture.name
    if mean_BCHW.dim() != 4 or len(mean_BCHW) != 1 or mean_BCHW.shape != std_BCHW.shape:
        raise DataError(f"The VAE gave latents of shape {tuple(mean_BCHW.shape)} for one image ({name}).")
    if not (torch.isfinite(mean_BCHW).all() and torch.isfinite(std_BCHW).all()):
        raise DataError(
            f"The VAE gave latents that are not finite for {name}. "
            "Set train_VAE_precision = fp32 or bf16, or use another VAE."
        )
    tensors = {"mean": mean_BCHW[0], "std": std_BCHW[0]}
    if mask_HW is not None:
        tensors["mask"] = F.adaptive_avg_pool2d(mask_HW[None], (mean_BCHW.shape[2], mean_BCHW.shape[3]))
    cache.put(item.key, tensors)


def _load(item: Pending) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        data = picture_bytes(item.picture.path)
        if hashlib.sha256(data).hexdigest() == item.content:
            return fit(*decode(data), item.placement)
        reason = "it changed"
    except BrokenPicture as error:
        reason = str(error)
    raise DataError(
        f"{item.picture.name} could be read a moment ago, but not now: {reason}. "
        "Start again when nothing writes to the folder."
    )
