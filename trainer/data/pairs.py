"""Pairs of pictures: which belong together, their latents side by side, and where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F

from ..errors import DataError
from .buckets import Placement, Size, place
from .cache import TensorCache, fingerprint
from .dataset import Dataset, Item, SizeFacts
from .dataset import build as build_dataset
from .encode import EncodeImages
from .images import BrokenPicture, decode, fit, picture_bytes, read_size, strips
from .plan import Plan, filled
from .scan import Picture, Scan, listed, scan
from .settings import ImageSettings
from .text import Progress

LEAST_EDGE = 32  # pixels: below it the UNet has nothing left at its lowest resolution
DIFFERENT = 10.0  # summed absolute difference of the three channels, 0..765, above which a pixel counts as different


@dataclass(frozen=True)
class PairScan:
    """Pairs of pictures of equal size: original i belongs to target i."""

    originals: Scan
    targets: Scan

    def reverted(self) -> PairScan:
        """The same with originals and targets swapped."""
        return PairScan(self.targets, self.originals)

    def with_captions(self, captions: tuple[str, str], replace: bool) -> PairScan:
        """The same with captions for originals and targets: for all with `replace`, else for those that have none."""
        sides = zip((self.originals, self.targets), captions, strict=True)
        return PairScan(*(_captioned(side, caption, replace) for side, caption in sides))


def single_pair(original: Path, target: Path, captions: tuple[str, str], masked: bool = False) -> PairScan:
    """The pair that two files make. Raises DataError naming everything that is wrong with them.

    `masked`: only where they differ clearly will be learned, so they must somewhere.
    """
    sides, faults = [], []
    for field, path, caption in zip(("original image", "target image"), (original, target), captions, strict=True):
        try:
            size = read_size(path)
        except BrokenPicture as error:
            faults.append(f"{field} {path.name} ({error})")
            continue
        if min(size) < LEAST_EDGE:
            faults.append(f"{field} {path.name} ({_times(size)} pixels; each side needs {LEAST_EDGE})")
        sides.append(Picture(path, path.name, path.parent.name or "pictures", size, caption, bool(caption), 1))
    if faults:
        raise DataError(f"The images cannot be used: {listed(faults)}. Choose others.")
    first, second = sides
    found = PairScan(*(Scan((side,), (), "one pair") for side in (first, second)))
    _refuse([*_unequal(first, second)] or [*_identical(first, second, masked)])
    return found


def find_pairs(settings: ImageSettings, suffix: str, masked: bool = False) -> PairScan:
    """The pairs below `settings.folder`: `<name><ext>` with `<name><suffix><ext>` beside it.

    Raises DataError naming every picture without partner, with several, or with one of another size or the same
    content (`masked`: nowhere clearly another); and as `scan` does. With `skip_broken` a pair of which one half cannot
    be read is left out.
    """
    found = scan(settings)
    by_stem: dict[str, list[Picture]] = {}
    for picture in found.pictures:
        by_stem.setdefault(_stem(picture.name), []).append(picture)
    broken = {_stem(one.name) for one in found.broken}
    originals, targets, faults = [], [], []
    for stem, pictures in by_stem.items():
        partner, source = stem + suffix, stem.removesuffix(suffix) if stem.endswith(suffix) else ""
        names = {*by_stem, *broken}
        if len(pictures) > 1:
            faults.append(" and ".join(picture.name for picture in pictures) + " (two images of one name)")
        elif source in names and partner in names:
            faults.append(f"{pictures[0].name} (it is the target of one image and the original of another)")
        elif partner in by_stem:
            originals.append(pictures[0])
            targets.append(by_stem[partner][0])
        elif source not in names and partner not in names:
            faults.append(f"{pictures[0].name} (no {PurePosixPath(partner).name} beside it)")
    for one, other in zip(originals, targets, strict=True):
        faults += [*_unequal(one, other)] or [*_identical(one, other, masked)]
    _refuse(faults)
    if not originals:
        raise DataError(f"No pair is left: every one has an image that cannot be read. diff_target_name = {suffix!r}.")
    rule = f"{found.repeats_rule}; {len(originals)} pairs"
    return PairScan(Scan(tuple(originals), found.broken, rule, found.left_out), Scan(tuple(targets), (), rule))


def originals_of(pictures: Sequence[Picture], suffix: str) -> tuple[Picture, ...]:
    """The pictures that have a partner `<name><suffix>` beside them: as many as there are pairs."""
    stems = {_stem(picture.name) for picture in pictures}
    return tuple(picture for picture in pictures if suffix and _stem(picture.name) + suffix in stems)


class PairDataset:
    """Pairs with their cached latents. An index is a position in `pairs`; those of one call must share a bucket."""

    def __init__(
        self,
        originals: Dataset,
        targets: Dataset,
        pairs: Sequence[tuple[int, int]],
        masks: Sequence[str],
        cache: TensorCache,
        opaque: bool = False,
    ) -> None:
        """`opaque`: the masks leave out what is transparent."""
        self.originals, self.targets = originals, targets
        self.pairs = tuple(pairs)
        self._masks, self._cache = tuple(masks), cache
        self.transparent = () if opaque else tuple(dict.fromkeys((*originals.transparent, *targets.transparent)))

    def item(self, index: int) -> Item:
        """The original of a pair."""
        return self.originals.items[self.pairs[index][0]]

    def plan(self, seed: int, batch_size: int, fill: bool = False) -> Plan:
        """The batches of a run; with `fill` a bucket smaller than a batch is repeated until whole batches are full."""
        pools: dict[Size, list[int]] = {}
        for index in range(len(self.pairs)):
            item = self.item(index)
            pools.setdefault(item.bucket, []).extend([index] * item.repeats)
        ordered = [pools[bucket] for bucket in sorted(pools)]
        return Plan([filled(pool, batch_size) for pool in ordered] if fill else ordered, seed, batch_size)

    def latents(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the originals' latents, then of the targets', each `BCHW` float32."""
        mine, other = zip(*(self.pairs[index] for index in indices), strict=True)
        return (*self.originals.latents(mine), *self.targets.latents(other))

    def mask(self, indices: Sequence[int]) -> torch.Tensor | None:
        """Where the pictures of each pair differ, `mask_B1HW` of 0 and 1, sized as the latents; None when not made."""
        if not self._masks:
            return None
        entries = [self._cache.get(self._masks[index]) for index in indices]
        if any(entry is None for entry in entries):
            raise DataError("A cached mask was removed or damaged during the run. Resume it: masks are made again.")
        return torch.stack([entry["mask"] for entry in entries if entry is not None])

    def captions(self, indices: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The captions of originals and targets."""
        mine, other = zip(*(self.pairs[index] for index in indices), strict=True)
        return self.originals.captions(mine), self.targets.captions(other)

    def sizes(self, indices: Sequence[int]) -> tuple[SizeFacts, ...]:
        """What SDXL is told of the sizes, the same for both pictures of a pair."""
        return self.originals.sizes([self.pairs[index][0] for index in indices])

    def all_captions(self) -> tuple[str, ...]:
        """Every caption once."""
        return tuple(dict.fromkeys((*self.originals.all_captions(), *self.targets.all_captions())))

    def fingerprint(self) -> str:
        """Identifies latents, captions, repeats and masks of both sides in their order."""
        sides = (self.originals.fingerprint(), self.targets.fingerprint())
        return fingerprint(kind="pairs", sides=sides, pairs=self.pairs, masks=self._masks)

    def summary(self) -> dict[str, object]:
        """Name → value for the preflight."""
        report = self.originals.summary()
        made = int(str(report["encoded now"])) + self.targets.encoded
        return {**report, "pairs": len(self.pairs), "encoded now": made}


@dataclass(frozen=True)
class MaskRule:
    """What a mask of a pair is: `grow` latents around every latent that has a different pixel; or, with `opaque`, as in
    TrainTrain, where the original is not transparent.
    """

    grow: int = 1
    opaque: bool = False


def difference_mask(
    original_CHW: torch.Tensor, target_CHW: torch.Tensor, latents: tuple[int, int], grow: int = 1
) -> torch.Tensor:
    """Where two pictures in [−1, 1] differ, `mask_1HW` of 0 and 1 at the size of the latents (height, width)."""
    different_1HW = _summed(original_CHW, target_CHW).gt(DIFFERENT).float()
    return F.max_pool2d(F.adaptive_max_pool2d(different_1HW, latents), 2 * grow + 1, 1, grow)


def opaque_mask(alpha_HW: torch.Tensor | None, latents: tuple[int, int]) -> torch.Tensor:
    """Where a picture is more than a tenth opaque, at one pixel for each latent, `mask_1HW` of 0 and 1; ones without
    transparency (None).
    """
    if alpha_HW is None:
        return torch.ones(1, *latents)
    return F.interpolate(alpha_HW.gt(0.1).float()[None, None], latents, mode="nearest")[0]


@dataclass(frozen=True)
class Encoding:
    """What encodes pictures: the function, the fingerprint of its weights, the cache."""

    encode_images: EncodeImages
    fingerprint: str
    cache: TensorCache
    progress: Progress | None = None


def build_pairs(
    settings: ImageSettings, found: PairScan, encoding: Encoding, mask: MaskRule | None = None
) -> PairDataset:
    """Encodes both sides and makes the masks (`mask` None: no masks).

    Raises DataError when pictures cannot be read (unless skipped) or nothing of a pair differs.
    """
    sides = [
        build_dataset(
            settings,
            encoding.encode_images,
            encoding.fingerprint,
            encoding.cache,
            encoding.progress,
            side,
        )
        for side in (found.originals, found.targets)
    ]
    partner = {
        one.name: other.name for one, other in zip(found.originals.pictures, found.targets.pictures, strict=True)
    }
    places = {(item.picture.name, item.placement): index for index, item in enumerate(sides[1].items)}
    pairs = [
        (index, places[key])
        for index, item in enumerate(sides[0].items)
        if (key := (partner[item.picture.name], item.placement)) in places
    ]
    if not pairs:
        raise DataError("No pair is left: of every one an image cannot be read. Repair or replace them.")
    masks = []
    if mask is not None:
        masks = [_mask(sides[0], sides[1], pair, encoding.cache, mask) for pair in pairs]
    return PairDataset(sides[0], sides[1], pairs, masks, encoding.cache, mask is not None and mask.opaque)


def _mask(originals: Dataset, targets: Dataset, pair: tuple[int, int], cache: TensorCache, rule: MaskRule) -> str:
    """The cache key of a pair's mask, which is made unless it is there."""
    names = (originals.key(pair[0]), targets.key(pair[1]))
    key = fingerprint(kind="pair mask", pair=names, grow=rule.grow, opaque=rule.opaque, limit=DIFFERENT)
    if cache.get(key) is None:
        item = originals.items[pair[0]]
        mean, _ = originals.latents([pair[0]])
        latents = (mean.shape[-2], mean.shape[-1])
        if rule.opaque:  # TrainTrain's masks are not mirrored with their pictures
            upright = place(item.placement.size, item.placement.bucket)
            cache.put(key, {"mask": opaque_mask(_pixels(item.picture, upright)[1], latents)})
            return key
        pictures = [
            _pixels(side.items[index].picture, item.placement)[0]
            for side, index in zip((originals, targets), pair, strict=True)
        ]
        made = difference_mask(pictures[0], pictures[1], latents, rule.grow)
        if not made.any():
            name, (width, height) = item.picture.name, item.placement.bucket
            raise DataError(
                f"{name} and its target do not differ clearly any more where they were cut to {width}×{height} pixels,"
                " so diff_use_diff_mask leaves nothing to learn. Switch it off, or use a larger image_size."
            )
        cache.put(key, {"mask": made})
    return key


def _pixels(picture: Picture, placement: Placement) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The picture in its bucket, `rgb_CHW` in [−1, 1], and how opaque it is, `alpha_HW` in [0, 1] or None."""
    return fit(*decode(picture_bytes(picture.path)), placement)


def _captioned(side: Scan, caption: str, replaced: bool) -> Scan:
    pictures = (
        replace(picture, caption=caption) if replaced or (caption and not picture.captioned) else picture
        for picture in side.pictures
    )
    return replace(side, pictures=tuple(pictures))


def _stem(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _times(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _unequal(one: Picture, other: Picture) -> Iterator[str]:
    if one.size != other.size:
        yield f"{one.name} and {other.name} ({_times(one.size)} and {_times(other.size)} pixels; they must be equal)"


def _identical(one: Picture, other: Picture, masked: bool) -> Iterator[str]:
    try:
        pairs = zip(strips(one.path), strips(other.path), strict=False)
        most = max(float(_summed(*pair).max()) for pair in pairs if pair[0].shape == pair[1].shape)
    except BrokenPicture:
        return  # told with its name when all pictures are checked
    if not most:
        yield f"{one.name} and {other.name} (they show the same, so there is nothing to learn)"
    elif masked and most <= DIFFERENT:
        yield f"{one.name} and {other.name} (no pixel differs clearly, so diff_use_diff_mask leaves nothing to learn)"


def _summed(one_CHW: torch.Tensor, other_CHW: torch.Tensor) -> torch.Tensor:
    """The absolute difference of two pictures in [−1, 1], summed over the channels, (1, H, W) from 0 to 765."""
    return (one_CHW - other_CHW).abs().sum(0, keepdim=True) * 127.5


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise DataError(
            f"{len(faults)} images or pairs cannot be used: {listed(list(faults))}. Both images of a pair need the"
            " same size and different content; in a folder, both the same name, the target's with diff_target_name at"
            " its end."
        )
