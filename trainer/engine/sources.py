"""Where batches come from. A mode names its source; a source knows data, text and processes, never a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset, SizeFacts
from ..models.base import Model
from ..modes.base import Batch
from .process import Process


def share_of(samples: Sequence[int], process: Process, batch_size: int) -> slice:
    """The part of a global batch that falls to this process: `batch_size` samples each, in rank order."""
    start = min(process.rank * batch_size, len(samples))
    return slice(start, min(start + batch_size, len(samples)))


@dataclass(frozen=True)
class Rules:
    """How batches are made. `fill`: a bucket with less than a batch is repeated to whole batches. `sizes_in_latents`:
    SDXL is given the size of the latents in place of picture, crop and size in pixels, as TrainTrain does.
    """

    fill: bool = False
    sizes_in_latents: bool = False


RULES = Rules()
"""Ours."""


def time_ids_of(model: Model, sizes: Sequence[SizeFacts], in_latents: bool = False) -> Tensor | None:
    """SDXL's size conditioning of pictures, (B, 6) in pixels on the model's device; None for models without it.

    `in_latents`: see `Rules`.
    """
    rows = [model.time_ids(facts.original, facts.crop, facts.target) for facts in sizes]
    if in_latents:
        small = [(facts.target[0] // model.latent_factor, facts.target[1] // model.latent_factor) for facts in sizes]
        rows = [model.time_ids(size, (0, 0), size) for size in small]
    return None if rows[0] is None else torch.stack([row for row in rows if row is not None]).to(model.device)


def facts_of(dataset: Dataset) -> dict[str, Any]:
    """What a file's metadata says of the pictures, as fields of `FileFacts`."""
    folders = {name: (facts["n_repeats"], facts["img_count"]) for name, facts in dataset.dataset_dirs().items()}
    return {
        "pictures": sum(repeats * count for repeats, count in folders.values()),
        "bucket_counts": dataset.bucket_report(),
        "dataset_folders": folders,
        "tag_frequency": dataset.tag_frequency(),
    }


class PictureSource:
    """Batches of a folder of captioned pictures."""

    def __init__(
        self, dataset: Dataset, model: Model, seed: int, batch_size: int, process: Process, rules: Rules = RULES
    ) -> None:
        self.dataset, self._model, self._process = dataset, model, process
        self._batch_size, self._rules = batch_size, rules
        self.plan = dataset.plan(seed, batch_size * process.count, rules.fill)
        self.batches_per_epoch: int | None = self.plan.batches_per_epoch

    def batch(self, index: int) -> Batch | None:
        """This process's part of global micro batch `index`; None when it has no sample in it."""
        whole = self.plan.batch(index)
        mine = share_of(whole, self._process, self._batch_size)
        items = whole[mine]
        if not items:
            return None
        mean, std = self.dataset.latents(items)
        device = self._model.device
        return Batch(
            index=index,
            samples=tuple(range(len(whole))[mine]),
            share=len(whole),
            prompts=self.dataset.captions(items),
            mean=mean.to(device),
            std=std.to(device),
            time_ids=time_ids_of(self._model, self.dataset.sizes(items), self._rules.sizes_in_latents),
        )

    def heaviest(self) -> int:
        """The global micro batch of the first epoch with the most pixels: it decides the memory."""

        def pixels(index: int) -> int:
            return sum(
                self.dataset.items[item].bucket[0] * self.dataset.items[item].bucket[1]
                for item in self.plan.batch(index)
            )

        return max(range(self.plan.batches_per_epoch), key=pixels)

    def shape(self, index: int) -> tuple[int, ...]:
        """(samples of this process, width, height in pixels, longest caption) of a global micro batch."""
        items = self.plan.batch(index)
        captions = max(len(caption) for caption in self.dataset.captions(items))
        return (min(len(items), self._batch_size), *self.dataset.items[items[0]].bucket, captions)

    def report(self) -> dict[str, object]:
        """What the preflight report says about the data."""
        return {**self.dataset.summary(), "batches per epoch": self.plan.batches_per_epoch}

    def on_white(self) -> tuple[str, ...]:
        """The images whose transparent parts are trained as white."""
        return self.dataset.transparent

    def prompts(self) -> tuple[str, ...]:
        """Every prompt a batch can have."""
        return self.dataset.all_captions()

    def facts(self) -> dict[str, Any]:
        """What a file's metadata says of the data, as fields of `FileFacts`."""
        return facts_of(self.dataset)

    def fingerprint(self) -> str:
        """Changes when a resumed run would see other data."""
        return self.dataset.fingerprint()


@dataclass(frozen=True)
class PromptPairs:
    """Original and target prompts, line i with line i; `size` is (height, width) in pixels.

    `anchors` are prompts that must stay as they are: pairs with themselves, in every second row when there are any.
    """

    originals: tuple[str, ...]
    targets: tuple[str, ...]
    size: tuple[int, int]
    anchors: tuple[str, ...] = ()

    def row(self, number: int) -> tuple[str, str]:
        """(prompt, target) of a row of the run: in turn, each pair one time as itself, the next as an anchor."""
        round_, place = divmod(number, len(self.originals))
        if self.anchors and (round_ + place) % 2:
            anchor = self.anchors[number // 2 % len(self.anchors)]
            return anchor, anchor
        return self.originals[place], self.targets[place]


class PromptSource:
    """Batches without pictures: the pairs of prompts in turn, with zeros in the place of latents."""

    batches_per_epoch: int | None = None

    def __init__(self, pairs: PromptPairs, model: Model, batch_size: int, process: Process) -> None:
        self._pairs, self._model, self._batch_size, self._process = pairs, model, batch_size, process

    def batch(self, index: int) -> Batch | None:
        """This process's part of global micro batch `index`."""
        share = self._batch_size * self._process.count
        samples = tuple(range(share))[share_of(range(share), self._process, self._batch_size)]
        rows = [self._pairs.row(index * share + sample) for sample in samples]
        height, width = (edge // self._model.latent_factor for edge in self._pairs.size)
        zeros = torch.zeros(len(samples), self._model.latent_channels, height, width, device=self._model.device)
        ids = self._model.time_ids(self._pairs.size, (0, 0), self._pairs.size)
        return Batch(
            index=index,
            samples=samples,
            share=share,
            prompts=tuple(prompt for prompt, _ in rows),
            targets=tuple(target for _, target in rows),
            mean=zeros,
            std=zeros,
            time_ids=None if ids is None else ids.expand(len(samples), -1).to(self._model.device),
        )

    def heaviest(self) -> int:
        """All batches are alike."""
        return 0

    def shape(self, index: int) -> tuple[int, ...]:
        """(samples, height, width, longest prompt)."""
        longest = max(map(len, self.prompts()))
        return (self._batch_size, *self._pairs.size, longest)

    def report(self) -> dict[str, object]:
        """What the preflight report says about the prompts."""
        pairs = zip(self._pairs.originals, self._pairs.targets, strict=True)
        told: dict[str, object] = {"pairs of prompts": [f"{original!r} → {target!r}" for original, target in pairs]}
        return {**told, "anchors": list(self._pairs.anchors)} if self._pairs.anchors else told

    def on_white(self) -> tuple[str, ...]:
        """There are no images."""
        return ()

    def prompts(self) -> tuple[str, ...]:
        """Every prompt a batch can have."""
        return tuple(dict.fromkeys((*self._pairs.originals, *self._pairs.targets, *self._pairs.anchors)))

    def facts(self) -> dict[str, Any]:
        """There are no pictures to tell of."""
        return {}

    def fingerprint(self) -> str:
        """The pairs themselves."""
        return repr(self._pairs)
