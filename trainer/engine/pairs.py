"""Batches of pairs of pictures, and of one picture of a pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data.dataset import build as build_dataset
from ..data.pairs import Encoding, PairDataset, PairScan, build_pairs
from ..data.scan import Scan
from ..models.base import Model
from ..modes.base import Batch
from ..params import core
from ..params.job import Job
from . import arguments
from .devices import fingerprint, picture_encoder
from .process import Process
from .site import Site
from .sources import RULES, PictureSource, Rules, facts_of, share_of, time_ids_of


class PairSource:
    """Batches of pairs: two posteriors, two captions, and where the pictures differ."""

    def __init__(
        self, pairs: PairDataset, model: Model, seed: int, batch_size: int, process: Process, rules: Rules = RULES
    ) -> None:
        self.pairs, self._model, self._process, self._batch_size = pairs, model, process, batch_size
        self.plan, self._rules = pairs.plan(seed, batch_size * process.count, rules.fill), rules
        self.batches_per_epoch: int | None = self.plan.batches_per_epoch

    def batch(self, index: int) -> Batch | None:
        """This process's part of global micro batch `index`; None when it has no sample in it."""
        whole = self.plan.batch(index)
        mine = share_of(whole, self._process, self._batch_size)
        items = whole[mine]
        if not items:
            return None
        device = self._model.device
        mean, std, target_mean, target_std = (side.to(device) for side in self.pairs.latents(items))
        originals, targets = self.pairs.captions(items)
        mask = self.pairs.mask(items)
        return Batch(
            index=index,
            samples=tuple(range(len(whole))[mine]),
            share=len(whole),
            prompts=originals,
            targets=targets,
            mean=mean,
            std=std,
            target_mean=target_mean,
            target_std=target_std,
            mask=None if mask is None else mask.to(device),
            time_ids=time_ids_of(self._model, self.pairs.sizes(items), self._rules.sizes_in_latents),
        )

    def heaviest(self) -> int:
        """The global micro batch of the first epoch with the most pixels: it decides the memory."""

        def pixels(index: int) -> int:
            buckets = [self.pairs.item(pair).bucket for pair in self.plan.batch(index)]
            return sum(width * height for width, height in buckets)

        return max(range(self.plan.batches_per_epoch), key=pixels)

    def shape(self, index: int) -> tuple[int, ...]:
        """(samples of this process, width, height in pixels, longest caption) of a global micro batch."""
        pairs = self.plan.batch(index)
        longest = max(len(caption) for side in self.pairs.captions(pairs) for caption in side)
        return (min(len(pairs), self._batch_size), *self.pairs.item(pairs[0]).bucket, longest)

    def report(self) -> dict[str, object]:
        """What the preflight report says about the pairs."""
        return {**self.pairs.summary(), "batches per epoch": self.plan.batches_per_epoch}

    def on_white(self) -> tuple[str, ...]:
        """The images whose transparent parts are trained as white, not left out by a mask."""
        return self.pairs.transparent

    def prompts(self) -> tuple[str, ...]:
        """Every prompt a batch can have."""
        return self.pairs.all_captions()

    def facts(self) -> dict[str, Any]:
        """What a file's metadata says of the data, as fields of `FileFacts`: the targets, which it was made to show."""
        return facts_of(self.pairs.targets)

    def fingerprint(self) -> str:
        """Changes when a resumed run would see other data."""
        return self.pairs.fingerprint()


def pair_source(job: Job, model: Model, seed: int, site: Site, found: PairScan) -> PairSource:
    """Encode the pairs that are not in the cache and plan the batches."""
    settings = arguments.pair_settings(job)
    with site.process.leader_first(), picture_encoder(model, site.log) as encode:
        work = Encoding(encode, fingerprint(model.vae), site.cache, site.log.progress)
        pairs = build_pairs(settings, found, work, arguments.pair_mask(job))
    for line in arguments.unused_prompts(job, found):
        site.log.warn(line)
    batch_size, rules = job[core.Train].train_batch_size, arguments.batch_rules(job)
    return PairSource(pairs, model, seed, batch_size, site.process, rules)


def _side_source(job: Job, model: Model, seed: int, site: Site, scanned: Scan) -> PictureSource:
    """Batches of one picture, taken as often as a batch needs it."""
    batch_size = job[core.Train].train_batch_size
    repeats = batch_size * site.process.count
    scanned = replace(scanned, pictures=tuple(replace(picture, repeats=repeats) for picture in scanned.pictures))
    with site.process.leader_first(), picture_encoder(model, site.log) as encode:
        dataset = build_dataset(
            arguments.pair_settings(job),
            encode,
            fingerprint(model.vae),
            site.cache,
            site.log.progress,
            scanned,
        )
    return PictureSource(dataset, model, seed, batch_size, site.process, arguments.batch_rules(job))


def original_source(job: Job, model: Model, seed: int, site: Site, found: PairScan) -> PictureSource:
    """Batches of the original picture alone."""
    return _side_source(job, model, seed, site, found.originals)


def target_source(job: Job, model: Model, seed: int, site: Site, found: PairScan) -> PictureSource:
    """Batches of the target picture alone."""
    return _side_source(job, model, seed, site, found.targets)
