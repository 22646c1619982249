"""Where batches come from. A mode names its source; a source knows data, text and processes, never a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.dataset import Dataset
from ..models.base import Model
from ..modes.base import Batch
from .process import Process


def share_of(samples: Sequence[int], process: Process, batch_size: int) -> slice:
    """The part of a global batch that falls to this process: `batch_size` samples each, in rank order."""
    start = min(process.rank * batch_size, len(samples))
    return slice(start, min(start + batch_size, len(samples)))


class PictureSource:
    """Batches of a folder of captioned pictures."""

    def __init__(self, dataset: Dataset, model: Model, seed: int, batch_size: int, process: Process) -> None:
        self.dataset, self._model, self._process = dataset, model, process
        self._batch_size = batch_size
        self.plan = dataset.plan(seed, batch_size * process.count)
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
        ids = [self._model.time_ids(facts.original, facts.crop, facts.target) for facts in self.dataset.sizes(items)]
        return Batch(
            index=index,
            samples=tuple(range(len(whole))[mine]),
            share=len(whole),
            prompts=self.dataset.captions(items),
            mean=mean.to(device),
            std=std.to(device),
            time_ids=None if ids[0] is None else torch.stack([row for row in ids if row is not None]).to(device),
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

    def prompts(self) -> tuple[str, ...]:
        """Every prompt a batch can have."""
        return self.dataset.all_captions()

    def facts(self) -> dict[str, Any]:
        """What a file's metadata says of the data, as fields of `FileFacts`."""
        folders = {
            name: (facts["n_repeats"], facts["img_count"]) for name, facts in self.dataset.dataset_dirs().items()
        }
        return {
            "pictures": sum(count for _, count in folders.values()),
            "bucket_counts": self.dataset.bucket_report(),
            "dataset_folders": folders,
            "tag_frequency": self.dataset.tag_frequency(),
        }

    def fingerprint(self) -> str:
        """Changes when a resumed run would see other data."""
        return self.dataset.fingerprint()
