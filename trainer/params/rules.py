"""What must hold between parameters: a table of rules, each with the fields it speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .core import Images, Network, Sample, Save, Task, Train
from .field import ModeInfo
from .files import name_problem
from .job import Job
from .names import LEARNING_RATE_ONE
from .previews import parse_previews


@dataclass(frozen=True)
class Rule:
    """One rule. `check` returns "" when all is well, else what is right and what to do.

    `fields` are attribute names; the first is where it is told. A `warning` does not stop the job. A `complete` rule
    holds when a run starts, not for a preset, which may leave things open.
    """

    fields: tuple[str, ...]
    check: Callable[[Job, ModeInfo], str]
    warning: bool = False
    complete: bool = False


def without_effect(switch: str, *fields: str, on: str = "") -> Rule:
    """A warning: `fields` are given, but `switch`, by which they would count, is off (or not `on`)."""

    def check(job: Job, mode: ModeInfo) -> str:
        value = job.value(switch)
        if value == on if on else value:
            return ""
        idle = [name for name in fields if job.value(name) != default_of(job, name)]
        return f"is not {on or 'switched on'}, so {' and '.join(idle)} has no effect." if idle else ""

    return Rule((switch, *fields), check, warning=True)


def default_of(job: Job, name: str) -> object:
    """The default of the parameter with this attribute name."""
    held = next(held for held in job.sections if name in type(held).__dataclass_fields__)  # type: ignore[attr-defined]
    return type(held).__dataclass_fields__[name].default  # type: ignore[attr-defined]


def timesteps(job: Job, mode: ModeInfo) -> str:
    """Minimum above maximum; equal is allowed and means always that timestep."""
    train = job[Train]
    if train.train_min_timesteps <= train.train_max_timesteps:
        return ""
    return f"is above train_max_timesteps ({train.train_max_timesteps}); swap the two."


def blocks(job: Job, mode: ModeInfo) -> str:
    """No block at all, or none of the part that is to be trained."""
    chosen, targets = job[Network].network_blocks, job[Network].network_targets
    if not chosen:
        return "has no block; select at least one."
    if targets == "text_encoder" and "BASE" not in chosen:
        return "has not BASE, the text encoder, but network_targets is text_encoder; select BASE or set both."
    if targets == "unet" and chosen == ("BASE",):
        return "has only BASE, the text encoder, but network_targets is unet; select blocks of the UNet or set both."
    return ""


def text_encoder(job: Job, mode: ModeInfo) -> str:
    """Nothing but the text encoder chosen, in a mode that leaves it alone unless told to."""
    network = job[Network]
    if "te_train" not in mode.needs or network.network_train_text_encoder:
        return ""
    if network.network_targets == "text_encoder":
        return "is off, but network_targets is text_encoder; switch it on or train the UNet."
    if network.network_blocks == ("BASE",):
        return "is off, but network_blocks has only BASE, the text encoder; switch it on or select blocks of the UNet."
    return ""


def save_name(job: Job, mode: ModeInfo) -> str:
    """A LoRA name that no system takes as a file name."""
    name = job[Save].save_lora_name
    if not name:
        return ""
    if name.lower().endswith(".safetensors"):
        return f"has the ending .safetensors, which is added by itself; write {name[: -len('.safetensors')]!r}."
    return name_problem(name)


def data_folder(job: Job, mode: ModeInfo) -> str:
    """A mode that learns from a folder (and not from a single pair of pictures) without a folder."""
    if job[Images].lora_data_directory.strip() or "folder" not in mode.needs or "pictures" in mode.needs:
        return ""
    return f"is empty; mode {job[Task].mode} learns from a folder of images, so write the folder they are in."


def pictures(job: Job, mode: ModeInfo) -> str:
    """A mode that compares two pictures without the first."""
    return _picture(job[Task].original_image, job, mode)


def target_picture(job: Job, mode: ModeInfo) -> str:
    """The same without the second."""
    return _picture(job[Task].target_image, job, mode)


def _picture(given: str, job: Job, mode: ModeInfo) -> str:
    if given.strip() or "pictures" not in mode.needs:
        return ""
    return f"is empty; mode {job[Task].mode} compares two images of one size, so give both files."


def length(job: Job, mode: ModeInfo) -> str:
    """No steps at all."""
    train = job[Train]
    if train.train_iterations or (train.train_epochs and "folder" in mode.needs):
        return ""
    rounds = ", or set train_epochs" if "folder" in mode.needs else ""
    return f"is 0, so nothing would be trained; write at least 1{rounds}."


def learning_rate(job: Job, mode: ModeInfo) -> str:
    """A rate of 0."""
    return "" if job[Train].train_learning_rate > 0 else "is 0, so nothing would be learned; write for example 1e-4."


def _text_untrained(job: Job) -> bool:
    own = job.traintrain or job[Train].train_traintrain_compatible
    return job[Train].train_textencoder_learning_rate == 0 and not own


def text_rate(job: Job, mode: ModeInfo) -> str:
    """A rate of 0 for the text encoder when nothing else is trained."""
    network = job[Network]
    alone = network.network_targets == "text_encoder" or network.network_blocks == ("BASE",)
    if not alone or not _text_untrained(job):
        return ""
    return "is 0, which leaves the text encoder untrained, but nothing else is to be trained; leave it empty."


def text_rate_zero(job: Job, mode: ModeInfo) -> str:
    """A rate of 0 for the text encoder, which two programs understand in two ways."""
    network = job[Network]
    if not _text_untrained(job) or network.network_targets == "unet" or "BASE" not in network.network_blocks:
        return ""
    return (
        "is 0, so the text encoder is not trained (as in kohya's scripts). Leave it empty to train it with"
        f" train_learning_rate ({job[Train].train_learning_rate:g}), which is what 0 means in TrainTrain."
    )


def strength(job: Job, mode: ModeInfo) -> str:
    """A strength of 0, which would save an empty LoRA."""
    return "" if job[Network].network_strength else "is 0, so the saved LoRA would do nothing; write for example 1."


def sample_prompts(job: Job, mode: ModeInfo) -> str:
    """Previews without a prompt."""
    sample = job[Sample]
    if not sample.sample_every or sample.sample_prompts.strip():
        return ""
    return f"is empty but sample_every is {sample.sample_every}; write a prompt per line, or set sample_every to 0."


def preview_flags(job: Job, mode: ModeInfo) -> str:
    """A flag behind a preview prompt that is not known, or has a wrong value."""
    try:
        parse_previews(job[Sample].sample_prompts)
    except ValueError as fault:
        return f"cannot be used: {fault}"
    return ""


def rate_of_one(job: Job, mode: ModeInfo) -> str:
    """A small rate for an optimizer that finds the rate itself."""
    train = job[Train]
    if train.train_optimizer not in LEARNING_RATE_ONE or train.train_learning_rate >= 0.1:
        return ""
    return f"is small for {train.train_optimizer}, which finds the rate itself and expects 1."


def alpha(job: Job, mode: ModeInfo) -> str:
    """An alpha far above the rank."""
    network = job[Network]
    if network.network_alpha <= 4 * network.network_rank:
        return ""
    return (
        f"is more than four times network_rank ({network.network_rank}): every step counts "
        f"{network.network_alpha / network.network_rank:g} times, which easily breaks the image."
    )


def warmup(job: Job, mode: ModeInfo) -> str:
    """A warm-up as long as the training."""
    train = job[Train]
    by_epochs = train.train_epochs and "folder" in mode.needs
    if not 0 < train.train_iterations <= train.train_lr_warmup_steps or by_epochs:
        return ""
    return f"is not below train_iterations ({train.train_iterations}), so the full learning rate is never reached."


def clipping(job: Job, mode: ModeInfo) -> str:
    """Clipping that was asked for beside TrainTrain's rules."""
    train = job[Train]
    if not train.train_traintrain_compatible or not train.train_max_grad_norm:
        return ""
    return "clips the gradients, which TrainTrain never does; leave it empty to train by its rules."


CORE_RULES: tuple[Rule, ...] = (
    Rule(("train_min_timesteps", "train_max_timesteps"), timesteps),
    Rule(("network_blocks", "network_targets"), blocks),
    Rule(("network_train_text_encoder", "network_targets", "mode"), text_encoder),
    Rule(("save_lora_name",), save_name),
    Rule(("lora_data_directory", "mode"), data_folder, complete=True),
    Rule(("original_image", "mode"), pictures, complete=True),
    Rule(("target_image", "mode"), target_picture, complete=True),
    Rule(("train_iterations", "train_epochs"), length),
    Rule(("train_learning_rate",), learning_rate),
    Rule(("train_textencoder_learning_rate", "network_targets", "network_blocks"), text_rate),
    Rule(("train_textencoder_learning_rate", "network_targets", "network_blocks"), text_rate_zero, warning=True),
    Rule(("network_strength",), strength),
    Rule(("sample_prompts", "sample_every"), sample_prompts, complete=True),
    Rule(("sample_prompts",), preview_flags),
    Rule(("train_learning_rate", "train_optimizer"), rate_of_one, warning=True),
    Rule(("network_alpha", "network_rank"), alpha, warning=True),
    Rule(("train_lr_warmup_steps", "train_iterations", "train_epochs"), warmup, warning=True),
    Rule(("train_max_grad_norm", "train_traintrain_compatible"), clipping, warning=True),
)
