"""Puts a session together: adapter, data, optimiser, mode. The model is already loaded."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..adapters.foreign import read_any
from ..adapters.metadata import baked_strength
from ..adapters.network import Network, build_network
from ..data.dataset import build as build_dataset
from ..data.scan import Scan
from ..data.text import TextOutputs
from ..errors import AdapterError
from ..events import EventLog
from ..maths import rng
from ..maths.scaling import LossScaler
from ..models.base import Model
from ..models.layers import layers_of
from ..modes.base import MODES, Mode, Pass, Preparation
from ..optim.optimizers import advice, make_optimizer
from ..optim.schedulers import make_scheduler
from ..optim.settings import parse_settings
from ..params import core
from ..params.job import Job
from ..paths import is_file
from ..stages.base import STAGES, Stage
from . import arguments
from .descent import Descent
from .devices import Visit, fingerprint, picture_encoder, settle
from .flat import FlatParameters
from .idle import idle_here
from .kit import Kit, Text
from .pairs import original_source, pair_source, target_source
from .session import Session, Source
from .shortage import ADAPTER, IMAGES, PREPARING, TEXTS, phase
from .site import Site
from .sources import PictureSource, PromptSource


def draw_seed(job: Job) -> int:
    """The job's seed, or a fresh one for −1."""
    seed = job[core.Train].train_seed
    return seed if seed >= 0 else secrets.randbelow(2**31)


def make_network(job: Job, model: Model, seed: int, log: EventLog, restored: bool = False) -> Network:
    """The adapter of a job, not yet attached; continued from `network_resume` when that is given.

    One that will be `restored` asks for no file: every tensor of it comes from the state of its run.
    """
    wanted = job[core.Network]
    mode = MODES.get(job[core.Task].mode).of(job)
    spec = arguments.adapter_spec(job, restored) if mode.steps else arguments.solved_spec(job, mode.rank(model))
    network = build_network(
        [layer for layer in layers_of(model) if mode.covers(layer)],
        replace(spec, device=model.device),
        blocks=wanted.network_blocks,
        element=wanted.network_element if mode.steps else None,
        parts=arguments.parts(job, mode.needs) if mode.steps else ("unet",),
        generator=rng.generator("adapter", seed),
        tell=log.note,
    )
    dtype = arguments.precision(job[core.Train].train_lora_precision, "train_lora_precision")
    network.to(model.device, dtype)
    if wanted.network_resume and mode.steps and "resume" in mode.needs and not restored:
        path = arguments.folder(wanted.network_resume)
        if not is_file(path):
            raise AdapterError(
                f"network_resume = {path.name!r}: there is no such file. Give the path of a LoRA, or leave it empty."
            )
        tensors, metadata = read_any(path)
        found = network.load(tensors, baked=baked_strength(metadata))
        log.note(f"Continuing from {path.name}: {found.matched} of {len(network)} modules found.")
        if found.unmatched:
            log.warn(
                f"{len(found.unmatched)} tensors of {path.name} belong to no trained module "
                f"(first: {found.unmatched[0]})."
            )
    return network


def text_is_trained(*networks: Network) -> bool:
    """Whether any adapter sits in a text encoder."""
    return any(part.startswith("te") for network in networks for part in network.parts())


def picture_source(job: Job, model: Model, seed: int, site: Site, scanned: Scan | None) -> PictureSource:
    """Encode the pictures that are not in the cache and plan the batches."""
    settings = arguments.image_settings(job)
    with site.process.leader_first(), picture_encoder(model, site.log) as encode:
        dataset = build_dataset(settings, encode, fingerprint(model.vae), site.cache, site.log.progress, scanned)
    batch_size, rules = job[core.Train].train_batch_size, arguments.batch_rules(job)
    return PictureSource(dataset, model, seed, batch_size, site.process, rules)


def prompt_source(job: Job, model: Model, seed: int, site: Site, found: None) -> PromptSource:
    """The pairs of prompts of a mode without pictures."""
    return PromptSource(arguments.prompts(job), model, job[core.Train].train_batch_size, site.process)


SOURCES: dict[str, Callable[..., Source]] = {
    "pictures": picture_source,
    "prompts": prompt_source,
    "pair": pair_source,
    "pairs": pair_source,
    "original": original_source,
    "target": target_source,
}


def make_text(
    job: Job, model: Model, network: Network, beneath: Sequence[Network], prompts: Sequence[str], site: Site
) -> Text:
    """Where conditionings come from: prepared once, unless a text encoder has adapters."""
    clip_skip = job[core.Train].train_clip_skip
    if text_is_trained(network, *beneath):
        return Text(model, clip_skip, None, network)
    encode = Visit(model, model.text_encoders, _text_encoder(model, clip_skip))
    cached = TextOutputs(site.cache, encode, fingerprint(*model.text_encoders), clip_skip)
    with site.process.leader_first(), encode:
        cached.prepare(prompts, site.log.progress)
    return Text(model, clip_skip, cached)


def make_optimizer_and_scheduler(
    job: Job, network: Network, total_steps: int, log: EventLog
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer over the parts of the network, each with its rate, and the schedule of the rates."""
    train = job[core.Train]
    if not total_steps:  # nothing will be stepped, whatever the job says of optimizers
        idle = torch.optim.SGD(list(network.parameters()), lr=0.0)
        return idle, torch.optim.lr_scheduler.LambdaLR(idle, lambda step: 1.0)
    rates = arguments.rates(job)
    groups = [
        {"name": group["name"], "params": group["params"], "lr": rates[group["part"]] * group["ratio"]}
        for group in network.trainable()
    ]
    settings = parse_settings(train.train_optimizer_settings, "train_optimizer_settings")
    optimizer = make_optimizer(train.train_optimizer, groups, settings, network)
    for line in advice(train.train_optimizer, [group["lr"] for group in groups], train.train_lr_scheduler):
        log.warn(line)
    scheduler = make_scheduler(
        train.train_lr_scheduler,
        optimizer,
        total_steps=total_steps,
        warmup=train.train_lr_warmup_steps,
        cycles=train.train_lr_scheduler_num_cycles,
        power=train.train_lr_scheduler_power,
        step_rules=train.train_lr_step_rules,
        settings=parse_settings(train.train_lr_scheduler_settings, "train_lr_scheduler_settings"),
    )
    return optimizer, scheduler


@dataclass(frozen=True)
class PassPlan:
    """One pass of a run: its settings, the job as it was given, its number from 0, and what the mode says of it.

    `written`: its adapter becomes a LoRA file. `final`: that is the run's result.
    """

    job: Job
    asked: Job
    number: int
    kind: Pass
    written: bool = True
    final: bool = True


def build(
    plan: PassPlan,
    model: Model,
    site: Site,
    found: Any,
    beneath: Sequence[Network] = (),
    *,
    resumed: bool = False,
    prepared: bool = True,
) -> Session:
    """A session ready to run its first step, the adapter attached. Ejecting it again is the caller's duty.

    `found` is what was found of the data before the model was loaded; `beneath` are attached networks of earlier
    passes. A `resumed` pass gets its adapter from the state afterwards. Mode and stages prepare the adapter, unless it
    is not to be `prepared`, which is enough to report on. Raises MemoryShortageError naming the phase.
    """
    with phase(PREPARING, model.device, plan.job):
        return _build(plan, model, site, found, beneath, resumed, prepared)


def _build(
    plan: PassPlan, model: Model, site: Site, found: Any, beneath: Sequence[Network], resumed: bool, prepared: bool
) -> Session:
    job, seed = plan.job, draw_seed(plan.job)
    mode = MODES.get(job[core.Task].mode).of(job)
    with phase(ADAPTER, model.device, job):
        network = make_network(job, model, seed, site.log, resumed)
    with phase(IMAGES, model.device, job):
        source = SOURCES[plan.kind.source](job, model, seed, site, found)
    stages = _stages(job) if mode.steps else ()
    asked = (*source.prompts(), *mode.prompts(), *(prompt for stage in stages for prompt in stage.prompts()))
    with phase(TEXTS, model.device, job):
        text = make_text(job, model, network, beneath, (*asked, *arguments.previewed(job)), site)
    settle(model, model.unet, *(model.text_encoders if text.trained else ()))
    limits = arguments.limits(job, source.batches_per_epoch, site.process.count)
    _report_layers(job, model, network, site.log)
    flat = FlatParameters(network)
    with flat.exact():
        optimizer, scheduler = make_optimizer_and_scheduler(job, network, limits.total_steps, site.log)
    scaled = torch.float16 in (model.compute, *(value.dtype for value in flat.values))
    model.set_gradient_checkpointing(job[core.Train].use_gradient_checkpointing, network.repeated)
    kit = Kit(model, network, text, seed, arguments.loss_settings(job))
    network.attach()
    try:
        if prepared:
            at = Preparation(
                *(network, model, kit, source.batch, site.log.note, seed, partial(mode.loss, kit)),
                resumed=resumed,
                stopping=site.stopping,
                progress=site.log.progress,
                descent=partial(Descent, flat, scaled),
            )
            _prepare(mode, stages, at, flat, site)
    except BaseException:
        network.eject()
        raise
    return Session(
        job=job,
        asked=plan.asked,
        seed=seed,
        model=model,
        network=network,
        mode=mode,
        kit=kit,
        stages=stages,
        source=source,
        flat=flat,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=LossScaler(flat.gradients, scaled),
        limits=limits,
        process=site.process,
        folder=site.folder,
        started_at=time.time(),
        number=plan.number,
        suffix=plan.kind.suffix,
        beneath=tuple(beneath),
    )


def _stages(job: Job) -> tuple[Stage, ...]:
    """The stages that a job asks for, in their turn."""
    wanted = (stage for _, stage in STAGES.items() if stage.wanted(job))
    return tuple(stage(job) for stage in sorted(wanted, key=lambda stage: stage.turn))


def _report_layers(job: Job, model: Model, network: Network, log: EventLog) -> None:
    """What has no effect on this model's layers, and with logging_verbose which of them are trained."""
    for line in idle_here(job, model, network):
        log.warn(line)
    if job[core.Log].logging_verbose:
        log.note("Trained modules: " + ", ".join(adapter.key for adapter in network) + ".")


def _prepare(mode: Mode, stages: Sequence[Stage], at: Preparation, flat: FlatParameters, site: Site) -> None:
    """Let mode and stages prepare the adapter; all processes go on with what the leading one has then."""
    mode.prepare(at)
    for stage in stages:
        stage.prepare(at)
    if stages:
        frozen = (p for p in at.network.parameters() if not p.requires_grad)
        buffers = (b for b in at.network.buffers() if b.is_floating_point())
        site.process.share([*flat.values, *frozen, *buffers])
    flat.adopt()


def _text_encoder(model: Model, clip_skip: int) -> Callable[[str], dict[str, torch.Tensor]]:
    """What `TextOutputs` takes: a prompt to its conditioning."""

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        row = model.encode_prompts([prompt], clip_skip)
        pooled = {} if row.pooled_BP is None else {"pooled_1P": row.pooled_BP}
        return {"context_1LD": row.context_BLD, **pooled}

    return encode
