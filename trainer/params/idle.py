"""Warnings of settings that have no effect beside others, or act twice with them: nothing is ignored silently."""

from __future__ import annotations

import re
from collections.abc import Callable

from .core import Images, Network, Pair, Sample, Save, Train
from .field import ModeInfo
from .job import Job
from .rules import Rule, default_of

RESTARTS = ("cosine_with_restarts", "cosine_annealing_with_restarts", "cyclic")
"""Schedules that train_lr_scheduler_num_cycles shapes."""

Why = Callable[[Job, ModeInfo], str]


def idle(name: str, *others: str, why: Why) -> Rule:
    """A warning: the field `name` is not at its default, but has no effect for the reason that `why` gives."""

    def check(job: Job, mode: ModeInfo) -> str:
        return "" if job.value(name) == default_of(job, name) else why(job, mode)

    return Rule((name, *others), check, warning=True)


def _steps(job: Job, mode: ModeInfo) -> int:
    """The steps of the run where they are known without its pictures, else 0."""
    train = job[Train]
    return 0 if train.train_epochs and "folder" in mode.needs else train.train_iterations


def _epochs_instead(job: Job, mode: ModeInfo) -> str:
    epochs = job[Train].train_epochs if "folder" in mode.needs and job[Train].train_iterations else 0
    return f"has no effect: train_epochs is {epochs}, which is used instead." if epochs else ""


def _no_restarts(job: Job, mode: ModeInfo) -> str:
    name = job[Train].train_lr_scheduler
    if name in RESTARTS:
        return ""
    return f"has no effect with train_lr_scheduler {name}, which never restarts; {', '.join(RESTARTS)} do."


def _only_with(scheduler: str) -> Why:
    def why(job: Job, mode: ModeInfo) -> str:
        name = job[Train].train_lr_scheduler
        return "" if name == scheduler else f"has no effect with train_lr_scheduler {name}; it belongs to {scheduler}."

    return why


def step_rules_missing(job: Job, mode: ModeInfo) -> str:
    """The schedule of steps without its steps."""
    train = job[Train]
    if train.train_lr_scheduler != "piecewise_constant" or train.train_lr_step_rules.strip():
        return ""
    return "is empty, but train_lr_scheduler piecewise_constant needs it; write it as in 1:100,0.1:200,0.01."


def no_warmup(job: Job, mode: ModeInfo) -> str:
    """The schedule with warm-up without one."""
    train = job[Train]
    if train.train_lr_scheduler != "constant_with_warmup" or train.train_lr_warmup_steps:
        return ""
    return "is the same as constant while train_lr_warmup_steps is 0."


def too_many_restarts(job: Job, mode: ModeInfo) -> str:
    """More restarts than steps."""
    train, steps = job[Train], _steps(job, mode)
    left = steps - train.train_lr_warmup_steps
    if train.train_lr_scheduler not in RESTARTS or not steps or train.train_lr_scheduler_num_cycles <= max(left, 1):
        return ""
    after = f" after {train.train_lr_warmup_steps} of warm-up" if train.train_lr_warmup_steps else ""
    return f"is more than the {max(left, 0)} steps of the run{after}; write at most that."


def _never_due(what: str) -> Why:
    """A distance in steps that the run never reaches before its end."""

    def why(job: Job, mode: ModeInfo) -> str:
        steps, every = _steps(job, mode), int(str(job.value(what)))
        if what == "sample_every":
            return f"has no effect: the run has {steps} steps, so no preview is generated." if 0 < steps < every else ""
        return f"has no effect: the run has {steps} steps, and its end is not counted." if 0 < steps <= every else ""

    return why


def _epochs_never_due(job: Job, mode: ModeInfo) -> str:
    epochs, every = job[Train].train_epochs, job[Save].save_per_epochs
    return f"has no effect: the run has {epochs} epochs, and its end is not counted." if 0 < epochs <= every else ""


def _no_samples(job: Job, mode: ModeInfo) -> str:
    return "" if job[Sample].sample_every else "has no effect while sample_every is 0; write the steps between two."


def weighted_twice(job: Job, mode: ModeInfo) -> str:
    """Two weights that both take from samples with little noise. (With velocity min-SNR acts where velocity is 1.)"""
    train = job[Train]
    if train.train_loss_weighting != "debiased" or not train.train_snr_gamma:
        return ""
    return (
        f"is multiplied with min-SNR (train_snr_gamma {train.train_snr_gamma:g}): both weaken samples with little"
        " noise. Set train_snr_gamma to 0 for debiased alone."
    )


def _untrained_text(job: Job, mode: ModeInfo) -> str:
    """Why no text encoder is trained, "" where one is."""
    network = job[Network]
    if network.network_targets == "unet":
        return "network_targets is unet"
    if "BASE" not in network.network_blocks:
        return "network_blocks leaves BASE out"
    if network.network_element != "Full":
        return f"network_element is {network.network_element}, which text encoders do not have"
    if "te_train" in mode.needs and not network.network_train_text_encoder:
        return "network_train_text_encoder is off"
    return ""


def _text_stays(job: Job, mode: ModeInfo) -> str:
    reason = _untrained_text(job, mode)
    return f"has no effect: {reason}, so the text encoder is not trained." if reason else ""


def element_without_unet(job: Job, mode: ModeInfo) -> str:
    """A kind of attention that only the UNet has, when the UNet is not trained."""
    network = job[Network]
    if network.network_element == "Full":
        return ""
    if network.network_targets == "text_encoder" or network.network_blocks == ("BASE",):
        return f"= {network.network_element} leaves nothing to train: only the UNet has it. Set Full."
    return ""


def smaller_than_its_sides(job: Job, mode: ModeInfo) -> str:
    """A shortest side above the sides of the pictures that somebody chose; what the default does the images show."""
    images = job[Images]
    short, long = sorted(images.image_size)
    if images.image_min_length <= short or images.image_min_length == default_of(job, "image_min_length"):
        return ""
    if images.image_min_length > long:
        return f"is above image_size, so that every image is cropped to {short}×{short}. Write {short} or less."
    return f"is above the short side of image_size ({short}): some buckets are shorter. Write {short} or less."


def _no_convolutions(job: Job, mode: ModeInfo) -> str:
    network = job[Network]
    if network.network_type not in ("null", "universal", "experts") or network.network_conv_rank:
        return ""
    return f"has no effect while network_conv_rank is 0: {network.network_type} leaves convolutions out then."


def second_pass_unused(job: Job, mode: ModeInfo) -> str:
    """Settings of a second pass that never comes."""
    if not job[Pair].diff_1st_pass_only or not job[Pair].use_2nd_pass_settings:
        return ""
    return "has no effect with diff_1st_pass_only, which ends before the second pass."


def nothing_to_pass(job: Job, mode: ModeInfo) -> str:
    """A first pass that is there already and is all that is asked for."""
    if not job[Pair].diff_1st_pass_only or not job[Pair].diff_load_1st_pass:
        return ""
    return "leaves nothing to do: diff_load_1st_pass brings the first pass. Switch it off, or empty diff_load_1st_pass."


def two_beginnings(job: Job, mode: ModeInfo) -> str:
    """A LoRA to start from beside the one that is the first pass."""
    given = job[Pair].diff_load_1st_pass
    if not given or not job[Network].network_resume:
        return ""
    return f"has no effect: diff_load_1st_pass ({given}) takes the place of the pass that would begin with it."


def _one_sample(job: Job, mode: ModeInfo) -> str:
    if job[Train].train_traintrain_compatible and "pair" in mode.needs:
        return "has no effect by TrainTrain's rules for pairs, whose timesteps are fixed anyway."
    if job[Train].train_traintrain_compatible and not mode.needs & {"folder", "pictures"}:
        return f"has no effect by TrainTrain's rules in mode {mode.name}, where each sample has its own."
    return "has no effect with train_batch_size 1." if job[Train].train_batch_size == 1 else ""


def _no_steps(job: Job, mode: ModeInfo) -> str:
    return "" if "steps" in mode.needs else f"has no effect: mode {mode.name} solves directly and takes no steps."


def _no_pictures(job: Job, mode: ModeInfo) -> str:
    if mode.needs & {"folder", "pictures"} or (job[Sample].sample_every and "steps" in mode.needs):
        return ""
    return f"has no effect: mode {mode.name} encodes no images, and no previews are generated."


def _rules_never_reached(job: Job, mode: ModeInfo) -> str:
    steps = _steps(job, mode)
    late = [int(found) for found in re.findall(r":\s*(\d{1,9})", job[Train].train_lr_step_rules) if int(found) >= steps]
    if not steps or not late or job[Train].train_lr_scheduler != "piecewise_constant":
        return ""
    return f"reaches to step {late[0]}, but the run has {steps}: what follows it has no effect."


IDLE_RULES: tuple[Rule, ...] = (
    idle("train_iterations", "train_epochs", why=_epochs_instead),
    idle("train_lr_scheduler_num_cycles", "train_lr_scheduler", why=_no_restarts),
    idle("train_lr_scheduler_power", "train_lr_scheduler", why=_only_with("polynomial")),
    idle("train_lr_step_rules", "train_lr_scheduler", why=_only_with("piecewise_constant")),
    Rule(("train_lr_step_rules", "train_lr_scheduler"), step_rules_missing, complete=True),
    Rule(("train_lr_step_rules", "train_iterations", "train_epochs"), _rules_never_reached, warning=True),
    Rule(("train_lr_scheduler", "train_lr_warmup_steps"), no_warmup, warning=True),
    *(idle(name, "mode", why=_no_steps) for name in ("sample_every", "train_state_every", "logging_trackers")),
    *(idle(name, "mode", "sample_every", why=_no_pictures) for name in ("vae", "train_VAE_precision")),
    Rule(("train_lr_scheduler_num_cycles", "train_lr_scheduler", "train_iterations", "train_epochs",
          "train_lr_warmup_steps"), too_many_restarts),
    idle("save_per_steps", "train_iterations", "train_epochs", why=_never_due("save_per_steps")),
    idle("save_per_epochs", "train_epochs", why=_epochs_never_due),
    idle("sample_every", "train_iterations", "train_epochs", why=_never_due("sample_every")),
    *(idle(name, "sample_every", why=_no_samples)
      for name in ("sample_prompts", "sample_steps", "sample_cfg", "sample_seed")),
    Rule(("train_loss_weighting", "train_snr_gamma"), weighted_twice, warning=True),
    idle("train_textencoder_learning_rate", "network_targets", "network_blocks", "network_element", why=_text_stays),
    idle("network_train_text_encoder", "network_targets", "network_blocks", "network_element", why=_text_stays),
    Rule(("network_element", "network_targets", "network_blocks"), element_without_unet),
    idle("network_conv_alpha", "network_conv_rank", "network_type", why=_no_convolutions),
    Rule(("image_min_length", "image_size"), smaller_than_its_sides, warning=True),
    Rule(("use_2nd_pass_settings", "diff_1st_pass_only"), second_pass_unused, warning=True),
    Rule(("diff_1st_pass_only", "diff_load_1st_pass"), nothing_to_pass),
    Rule(("network_resume", "diff_load_1st_pass", "mode"), two_beginnings, warning=True),
    idle("train_fixed_timsteps_in_batch", "train_batch_size", "mode", why=_one_sample),
)  # fmt: skip
