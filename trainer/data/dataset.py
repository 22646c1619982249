"""The pictures of a run as items with cached latents, in batches of one bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import DataError
from .buckets import Placement, Size, full_buckets, own_bucket, placements, shrink_buckets
from .cache import TensorCache, Tensors, fingerprint
from .encode import EncodeImages, check_pictures, encode_pending
from .plan import Plan, filled
from .scan import Picture, Scan, listed, refuse_broken, scan
from .settings import ImageSettings
from .text import Progress


@dataclass(frozen=True)
class SizeFacts:
    """The sizes that SDXL is told, in pixels: original and target as (height, width), crop as (top, left)."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One training sample: a picture in a bucket. `repeats` is how often it counts in an epoch."""

    picture: Picture
    placement: Placement
    repeats: int

    @property
    def bucket(self) -> Size:
        """(width, height) in pixels."""
        return self.placement.bucket

    @property
    def flipped(self) -> bool:
        """Whether it is the mirror image."""
        return self.placement.flipped

    @property
    def caption(self) -> str:
        """Trigger word and caption."""
        return self.picture.caption

    @property
    def sizes(self) -> SizeFacts:
        """What SDXL is told of it; the crop is counted in pixels of the resized, mirrored picture."""
        (width, height), bucket = self.picture.size, self.placement.bucket
        return SizeFacts((height, width), self.placement.crop, (bucket[1], bucket[0]))


@dataclass(frozen=True)
class Arrangement:
    """What a scan gives with the settings, before anything is encoded. `too_small` names pictures left out; `multiply`
    is what the repeats of all are multiplied with; `copies` are the smaller copies asked for, and how many there are.
    """

    items: tuple[Item, ...]
    too_small: tuple[str, ...]
    multiply: int = 1
    copies: tuple[int, int] = (0, 0)

    def bucket_report(self) -> dict[str, int]:
        """Samples per epoch by bucket, `{"512x768": 20}` (width x height)."""
        counts: Counter[Size] = Counter()
        for item in self.items:
            counts[item.bucket] += item.repeats
        return {f"{width}x{height}": counts[width, height] for width, height in sorted(counts)}

    def summary(self) -> dict[str, object]:
        """Name → value for the preflight."""
        report: dict[str, object] = {
            "samples per epoch": sum(item.repeats for item in self.items),
            "buckets": self.bucket_report(),
            "enlarged images": len({item.picture.name for item in self.items if _enlarged(item.placement)}),
        }
        if self.multiply > 1:
            report["repeats times image_num_multiply"] = self.multiply
        wanted, there = self.copies
        if wanted > there:
            report["smaller copies"] = f"{there} of {wanted}: there are no more smaller buckets"
        if self.too_small:
            report["left out as too small"] = list(self.too_small)
        return report


def arrange(pictures: Sequence[Picture], settings: ImageSettings) -> Arrangement:
    """Puts every picture in its buckets. Raises JobError for unusable settings, DataError when all are too small."""
    full = full_buckets(settings)
    shrink = shrink_buckets(settings) if settings.sub_images else ()
    items: list[Item] = []
    too_small: list[str] = []
    for picture in pictures:
        placed = placements(picture.size, settings, (own_bucket(picture.size),) if settings.own_size else full, shrink)
        items += [Item(picture, placement, picture.repeats * settings.multiply) for placement in placed]
        if not placed:
            too_small.append(picture.name)
    if not items:
        raise DataError(
            f"All {len(pictures)} images are smaller than their buckets and image_disable_upscale is on: "
            f"{listed(too_small)}. Lower image_size(height, width) or switch image_disable_upscale off."
        )
    copies = (settings.sub_images, min(settings.sub_images, len(shrink)))
    return Arrangement(tuple(items), tuple(too_small), settings.multiply, copies)


class Dataset:
    """Items with their cached latents. Indices are positions in `items`; those of one call must share a bucket.

    `transparent`: the names of the pictures that have transparent parts, which are encoded on white.
    """

    def __init__(
        self,
        scan: Scan,
        arrangement: Arrangement,
        keys: Sequence[str],
        cache: TensorCache,
        encoded: int,
        transparent: Sequence[str] = (),
    ) -> None:
        self.scan = scan
        self.arrangement = arrangement
        self.items = arrangement.items
        self.encoded = encoded
        self.transparent = tuple(transparent)
        self._keys = tuple(keys)
        self._cache = cache

    def plan(self, seed: int, batch_size: int, fill: bool = False) -> Plan:
        """The batches of a run, by seed alone; with `fill` a bucket smaller than a batch is repeated to whole batches.

        Raises DataError for a batch size below 1.
        """
        pools: dict[Size, list[int]] = {bucket: [] for bucket in sorted({item.bucket for item in self.items})}
        for index, item in enumerate(self.items):
            pools[item.bucket] += [index] * item.repeats
        return Plan([filled(pool, batch_size) if fill else pool for pool in pools.values()], seed, batch_size)

    def latents(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, each `BCHW` float32 on the CPU.

        Raises DataError when the cache lost an entry during the run.
        """
        entries = [self._entry(index) for index in indices]
        return torch.stack([entry["mean"] for entry in entries]), torch.stack([entry["std"] for entry in entries])

    def mask(self, indices: Sequence[int]) -> torch.Tensor | None:
        """How opaque the pictures are: `mask_B1HW` in [0, 1], sized as the latents; None if all are fully opaque."""
        entries = [self._entry(index) for index in indices]
        if not any("mask" in entry for entry in entries):
            return None
        return torch.stack(
            [entry["mask"] if "mask" in entry else torch.ones_like(entry["mean"][:1]) for entry in entries]
        )

    def key(self, index: int) -> str:
        """The fingerprint of an item's latents: of the picture's content and of how it fills its bucket."""
        return self._keys[index]

    def captions(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The captions, trigger word included."""
        return tuple(self.items[index].caption for index in indices)

    def sizes(self, indices: Sequence[int]) -> tuple[SizeFacts, ...]:
        """What SDXL is told of the sizes."""
        return tuple(self.items[index].sizes for index in indices)

    def all_captions(self) -> tuple[str, ...]:
        """Every caption once, in the order of the pictures."""
        return tuple(dict.fromkeys(item.caption for item in self.items))

    def bucket_report(self) -> dict[str, int]:
        """Samples per epoch by bucket, `{"512x768": 20}` (width x height)."""
        return self.arrangement.bucket_report()

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Folder base name → tag → number of pictures whose caption has it, as kohya's metadata counts."""
        counts: dict[str, Counter[str]] = {}
        for picture in self._pictures():
            tags = [tag.strip() for tag in picture.caption.split(",")]
            counts.setdefault(picture.folder, Counter()).update(tag for tag in tags if tag)
        return {folder: dict(tags) for folder, tags in counts.items()}

    def dataset_dirs(self) -> dict[str, dict[str, int]]:
        """Folder base name → `n_repeats` and `img_count`, as kohya's metadata has it."""
        repeats = {item.picture.folder: item.repeats for item in self.items}
        counts = Counter(picture.folder for picture in self._pictures())
        return {folder: {"n_repeats": repeats[folder], "img_count": count} for folder, count in counts.items()}

    def fingerprint(self) -> str:
        """Identifies latents, captions and repeats in their order: equal for two runs exactly when their data are."""
        return fingerprint(
            kind="dataset",
            items=[(key, item.caption, item.repeats) for key, item in zip(self._keys, self.items, strict=True)],
        )

    def summary(self) -> dict[str, object]:
        """Name → value for the preflight."""
        return {**self.scan.summary(), **self.arrangement.summary(), "encoded now": self.encoded}

    def _pictures(self) -> tuple[Picture, ...]:
        return tuple({item.picture.name: item.picture for item in self.items}.values())

    def _entry(self, index: int) -> Tensors:
        entry = self._cache.get(self._keys[index])
        if entry is None:
            raise DataError(
                f"The cached latents of {self.items[index].picture.name} were removed or damaged during the run. "
                "Resume the run: they are encoded again at its start."
            )
        return entry


def build(
    settings: ImageSettings,
    encode_images: EncodeImages,
    vae_fingerprint: str,
    cache: TensorCache,
    progress: Progress | None = None,
    scanned: Scan | None = None,
) -> Dataset:
    """Scans, arranges, checks and encodes: everything needed before the first step.

    `encode_images` turns `pixels_BCHW` in [-1, 1] into mean and std of the latents; `vae_fingerprint` identifies the
    VAE's weights, precision and latent scale. `progress` hears (name, done, total); what it raises ends the work, and
    what was encoded until then stays in the cache.

    Raises JobError for unusable settings; DataError for missing, broken (unless skipped) or too small pictures.
    """
    found = scanned or scan(settings)
    arrangement = arrange(found.pictures, settings)
    work = _work(arrangement)
    checked = check_pictures(work, vae_fingerprint, cache, progress)
    refuse_broken(checked.broken, len(checked.keys), settings.skip_broken)
    if checked.broken:
        bad = {broken.name for broken in checked.broken}
        kept = tuple(picture for picture in found.pictures if picture.name not in bad)
        found = replace(found, pictures=kept, broken=(*found.broken, *checked.broken))
        arrangement = arrange(kept, settings)
    encode_pending(checked.pending, encode_images, cache, progress)
    keys = [key for picture, _ in _work(arrangement) for key in checked.keys[picture.name]]
    return Dataset(found, arrangement, keys, cache, len(checked.pending), checked.transparent)


def _work(arrangement: Arrangement) -> list[tuple[Picture, tuple[Placement, ...]]]:
    """Pictures with their placements, in the order of the items."""
    by_picture: dict[str, list[Item]] = {}
    for item in arrangement.items:
        by_picture.setdefault(item.picture.name, []).append(item)
    return [(items[0].picture, tuple(item.placement for item in items)) for items in by_picture.values()]


def _enlarged(placement: Placement) -> bool:
    return placement.resized[0] > placement.size[0] or placement.resized[1] > placement.size[1]
