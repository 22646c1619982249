"""From a job to the plain records the rooms below take: the only place where parameters become arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.base import ADAPTERS, AdapterSpec
from ..adapters.export import ExportSettings
from ..data.buckets import own_bucket
from ..data.images import BrokenPicture, read_size
from ..data.pairs import MaskRule, PairScan, find_pairs, single_pair
from ..data.scan import with_trigger
from ..data.settings import ImageSettings
from ..errors import JobError, Problem
from ..modes.base import MODES
from ..modes.prompts import prompt_pairs
from ..params import core
from ..params.job import Job
from ..params.network import NetworkOptions
from ..params.previews import Preview, parse_previews
from ..paths import expanded
from .kit import LossSettings
from .length import Length
from .samples import Drawing, SampleSettings
from .session import Limits
from .sources import PromptPairs, Rules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name: str, field: str) -> torch.dtype | None:
    """The dtype of a precision name; None for `model`, which keeps what is there. Raises JobError for int8."""
    if name == "model":
        return None
    if name not in DTYPES:
        message = "a quantised base model cannot be trained yet; use model, fp16, bf16 or fp32."
        raise JobError([Problem(field, name, message)])
    return DTYPES[name]


def precision_name(dtype: torch.dtype) -> str:
    """The name of a precision as the settings have it, another one's as torch has it."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def folder(text: str) -> Path:
    """A folder as people paste it: quotes around it (Windows' "Copy as path") and `~` are understood."""
    return expanded(text.strip().strip('"'))


def text_files(job: Job) -> tuple[str, ...]:
    """The text encoder files a job names."""
    return tuple(name.strip().strip('"') for name in job[core.Task].te.replace("\n", ";").split(";") if name.strip())


def image_settings(job: Job) -> ImageSettings:
    """How pictures are found and cut."""
    images = job[core.Images]
    return ImageSettings(
        folder=folder(images.lora_data_directory),
        trigger=images.lora_trigger_word,
        size=images.image_size,
        buckets_step=images.image_buckets_step,
        min_length=images.image_min_length,
        max_ratio=images.image_max_ratio,
        sub_images=images.sub_image_num,
        mirroring=images.image_mirroring,
        filename_as_tag=images.image_use_filename_as_tag,
        disable_upscale=images.image_disable_upscale,
        multiply=images.image_num_multiply,
        skip_broken=images.data_skip_broken,
    )


def pair_settings(job: Job) -> ImageSettings:
    """How the pictures of pairs are cut: as those of a folder, or, where two files are given, left at their size."""
    if "pictures" not in MODES.get(job[core.Task].mode).needs:
        return image_settings(job)
    return ImageSettings(folder=folder(job[core.Task].original_image).parent, own_size=True)


def find_pair_data(job: Job) -> PairScan:
    """The pair or pairs of a job, in the direction it asks for. Raises DataError naming what cannot be used.

    In a folder the prompts stand in for captions that are missing, and by TrainTrain's rules for all of them.
    """
    task, needs, pair = job[core.Task], MODES.get(job[core.Task].mode).needs, job[core.Pair]
    own_rules = not job[core.Train].train_traintrain_compatible
    masked = "pair" in needs and pair.diff_use_diff_mask and own_rules
    prompts = pair_prompts(job)
    if "pictures" in needs:
        found = single_pair(folder(task.original_image), folder(task.target_image), prompts, masked)
    else:
        found = find_pairs(image_settings(job), job[core.Images].diff_target_name, masked)
        found = found.with_captions(prompts, replace=not own_rules)
    if "pair" not in needs or not pair.diff_revert_original_target:
        return found
    turned = found.reverted()
    return turned if own_rules else turned.with_captions(prompts, replace=True)


def pair_prompts(job: Job) -> tuple[str, str]:
    """Captions of original and target picture, after the trigger word.

    An empty target prompt is the original one. TrainTrain takes it as it is, in Difference never looks at it, and has
    the trigger word in neither.
    """
    task, images = job[core.Task], job[core.Images]
    original, target = task.original_prompt.strip(), task.target_prompt.strip()
    seed = of_traintrain(job)
    if (not seed and not target) or (seed and "first_pass" in MODES.get(task.mode).needs):
        target = original
    trigger = "" if seed else images.lora_trigger_word
    return with_trigger(trigger, original), with_trigger(trigger, target)


def of_traintrain(job: Job) -> bool:
    """Whether the values are meant as TrainTrain means them: its own file, or its rules asked for."""
    return job.traintrain or job[core.Train].train_traintrain_compatible


def pair_mask(job: Job) -> MaskRule | None:
    """How the masks of a job's pairs are made; None for no masks, which is what TrainTrain has for a single pair."""
    if not job[core.Pair].diff_use_diff_mask or "pair" not in MODES.get(job[core.Task].mode).needs:
        return None
    if not job[core.Train].train_traintrain_compatible:
        return MaskRule()
    return None if "pictures" in MODES.get(job[core.Task].mode).needs else MaskRule(opaque=True)


def max_grad_norm(job: Job) -> float:
    """The limit of the gradients' norm, 0 for none. TrainTrain never clips, so empty means that in its files."""
    given = job[core.Train].train_max_grad_norm
    return given if given is not None else 0.0 if of_traintrain(job) else 1.0


def loss_settings(job: Job) -> LossSettings:
    """Distance, weights and timesteps."""
    train = job[core.Train]
    return LossSettings(
        distance=train.train_loss_function,
        weighting=train.train_loss_weighting,
        snr_gamma=train.train_snr_gamma,
        low=train.train_min_timesteps,
        high=train.train_max_timesteps,
        fixed_timesteps=train.train_fixed_timsteps_in_batch and not _without_fixed(job),
        traintrain=train.train_traintrain_compatible,
    )


def _without_fixed(job: Job) -> bool:
    """Whether each sample of a batch has its own timestep in any case: TrainTrain's iLECO does not ask."""
    kind = MODES.get(job[core.Task].mode)
    return job[core.Train].train_traintrain_compatible and kind.source == "prompts"


def adapter_spec(job: Job, restored: bool = False) -> AdapterSpec:
    """What every adapter of the network is built from. A convolution rank or alpha of 0 means the linear one."""
    network = job[core.Network]
    return AdapterSpec(
        type=network.network_type,
        rank=network.network_rank,
        alpha=network.network_alpha,
        conv_rank=network.network_conv_rank,
        conv_alpha=network.network_conv_alpha,
        options={section: job[section] for section in (NetworkOptions, *ADAPTERS.get(network.network_type).sections)},
        restored=restored,
    )


def solved_spec(job: Job, rank: int) -> AdapterSpec:
    """The adapter of a mode without steps: a plain LoRA of its rank, on the layers the job leaves it."""
    options = NetworkOptions(network_name_filter=job[NetworkOptions].network_name_filter)
    return AdapterSpec(rank=rank, alpha=float(rank), options={NetworkOptions: options})


def parts(job: Job, needs: Collection[str]) -> Collection[str]:
    """The parts of the model that are trained: unet, te1, te2.

    Modes that ask whether to train the text encoder (`te_train` among their `needs`) leave it out unless told to. So
    does a learning rate of 0.
    """
    wanted = {"both": ("unet", "te1", "te2"), "unet": ("unet",), "text_encoder": ("te1", "te2")}
    network = job[core.Network]
    chosen = wanted[network.network_targets]
    if ("te_train" in needs and not network.network_train_text_encoder) or not text_rate(job):
        return tuple(part for part in chosen if part == "unet")
    return chosen


def prompts(job: Job) -> PromptPairs:
    """The pairs of prompts of a job, and the anchors its mode holds."""
    anchors, size = MODES.get(job[core.Task].mode).of(job).anchors(), job[core.Images].image_size
    if job[core.Train].train_traintrain_compatible:
        size = (min(size), max(size))  # its pictures are never upright here
    return PromptPairs(*prompt_pairs(job), size, anchors)


def typed_prompts(job: Job) -> tuple[str, ...]:
    """The prompts of a job that are not captions of a folder, anchors included."""
    if MODES.get(job[core.Task].mode).source != "prompts":
        return pair_prompts(job)
    pairs = prompts(job)
    return (*pairs.originals, *pairs.targets, *pairs.anchors)


def length(job: Job, batches_per_epoch: int | None) -> Length:
    """How long the run is; `batches_per_epoch` are micro batches, None for modes without pictures."""
    train = job[core.Train]
    if not MODES.get(job[core.Task].mode).steps:
        return Length(0)
    accumulation, per_epoch = train.train_gradient_accumulation, batches_per_epoch or 0
    if (epochs := train.train_epochs if has_epochs(job) else 0) and per_epoch:
        return Length.of_epochs(epochs, accumulation, per_epoch)
    return Length.of_steps(train.train_iterations, accumulation, per_epoch)


def has_epochs(job: Job) -> bool:
    """Whether the mode counts in epochs: those do that learn from a folder."""
    return "folder" in MODES.get(job[core.Task].mode).needs


def fills(job: Job) -> bool:
    """Whether a bucket with less than a batch is repeated to whole batches: for the one pair of two files, and as
    TrainTrain does by its rules. A run that is counted in epochs never does, so that every picture counts alike.
    """
    train = job[core.Train]
    if not has_epochs(job):
        return True
    return train.train_traintrain_compatible and not train.train_epochs


def batch_rules(job: Job) -> Rules:
    """How the batches of a job are made."""
    return Rules(fills(job), sizes_in_latents=job[core.Train].train_traintrain_compatible)


def unused_prompts(job: Job, found: PairScan) -> Iterator[str]:
    """Lines to warn with: prompts that were typed for the pairs of a folder which all have captions of their own."""
    task = job[core.Task]
    if "pair_name" not in MODES.get(task.mode).needs or job[core.Train].train_traintrain_compatible:
        return
    if all(picture.captioned for side in (found.originals, found.targets) for picture in side.pictures):
        for field, typed in (("original prompt", task.original_prompt), ("target prompt", task.target_prompt)):
            if typed.strip():
                yield f"{field} has no effect: every image has a caption of its own, which is used instead."


def limits(job: Job, batches_per_epoch: int | None, processes: int) -> Limits:
    """The numbers of the loop; `batches_per_epoch` is None for modes without pictures."""
    train, save = job[core.Train], job[core.Save]
    counted = length(job, batches_per_epoch)
    due = set(range(save.save_per_steps, counted.steps, save.save_per_steps)) if save.save_per_steps else set()
    if save.save_per_epochs and has_epochs(job):
        ends = range(save.save_per_epochs, math.ceil(counted.epochs), save.save_per_epochs)
        due |= {end for epoch in ends if (end := counted.end_of(epoch)) < counted.steps}
    return Limits(
        length=counted,
        max_grad_norm=max_grad_norm(job),
        state_every=train.train_state_every if counted.steps else 0,
        sample_every=job[core.Sample].sample_every,
        save_steps=frozenset(due),
        batch_size=train.train_batch_size * processes,
    )


def previewed(job: Job) -> tuple[str, ...]:
    """The texts that previews are drawn with, negative ones included; none where none are drawn."""
    wanted = job[core.Sample]
    found = parse_previews(wanted.sample_prompts) if wanted.sample_every else ()
    return tuple(dict.fromkeys(text for one in found for text in (one.prompt, one.negative)))


def previews(job: Job) -> tuple[Drawing, ...]:
    """The previews of a job; none where none are drawn."""
    usual = sample_settings(job)
    found = parse_previews(job[core.Sample].sample_prompts) if job[core.Sample].sample_every else ()
    return tuple(Drawing(one.prompt, one.negative, _preview_settings(one, usual)) for one in found)


def _preview_settings(one: Preview, usual: SampleSettings) -> SampleSettings:
    size = (one.height or usual.size[0], one.width or usual.size[1])
    own = {"steps": one.steps, "cfg": one.cfg, "seed": one.seed}
    given = {name: value for name, value in own.items() if value is not None}
    return replace(usual, size=size, batch_size=_at_once(size), **given)


def _at_once(size: tuple[int, int]) -> int:
    return 1 if max(size) > 256 else 8


def sample_settings(job: Job) -> SampleSettings:
    """How preview pictures are drawn: in the size of the pictures that are trained."""
    wanted, size = job[core.Sample], job[core.Images].image_size
    if "pictures" in MODES.get(job[core.Task].mode).needs:
        with contextlib.suppress(BrokenPicture):  # told of where the pair is read
            width, height = own_bucket(read_size(folder(job[core.Task].original_image)))
            size = (height, width)
    return SampleSettings(
        size=size,
        steps=wanted.sample_steps,
        cfg=wanted.sample_cfg,
        seed=wanted.sample_seed,
        clip_skip=job[core.Train].train_clip_skip,
        batch_size=_at_once(size),
    )


def export_settings(job: Job) -> ExportSettings:
    """In which form the adapter is written."""
    wanted = job[core.Export]
    return ExportSettings(wanted.export_format, wanted.export_rank, wanted.export_max_error)


def rates(job: Job) -> dict[str, float]:
    """Learning rate by part."""
    rate, text = job[core.Train].train_learning_rate, text_rate(job)
    return {"unet": rate, "te1": text, "te2": text}


def text_rate(job: Job) -> float:
    """The learning rate of the text encoder; with 0 it is not trained, except for TrainTrain, where 0 means empty."""
    given = job[core.Train].train_textencoder_learning_rate
    own = "te_rate" in MODES.get(job[core.Task].mode).needs
    if given is None or not own or (given == 0 and of_traintrain(job)):
        return job[core.Train].train_learning_rate
    return given
