"""The LoRA file of a session: tensors with the strength baked once, and all that can be said about how it was made."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.export import export_network
from ..adapters.file import write_lora
from ..adapters.metadata import FileFacts, build_metadata
from ..optim.settings import parse_settings
from ..params import core
from ..params.network import NetworkOptions
from . import arguments
from .session import Session


def write_network(session: Session, path: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Write the adapter as it stands; returns where it really is. Raises AdapterError, with nothing left behind.

    `tell` hears what the user should know of the form it was written in.
    """
    job = session.job
    strength = job[core.Network].network_strength
    wanted = arguments.precision(job[core.Save].save_precision, "save_precision") or session.model.storage
    exported = export_network(session.network, wanted, strength, arguments.export_settings(job))
    if exported.message:
        tell(exported.message)
    described = facts(session, path.stem, exported.facts)
    metadata, save = build_metadata(described, job[core.Save].save_metadata), job[core.Save]
    return write_lora(path, exported.tensors, metadata, overwrite=save.save_overwrite)


def facts(session: Session, name: str, network: Mapping[str, Any]) -> FileFacts:
    """What the file's metadata is made of; `network`: what is to be said of the adapter."""
    job, model, source = session.job, session.model, session.source
    train, images = job[core.Train], job[core.Images]
    rates = arguments.rates(job)
    length = session.limits.length
    height, width = images.image_size
    return FileFacts(
        name=name,
        base_version=model.family.base_version,
        prediction=model.process.prediction,
        model_name=model.name if model.path is None else model.path.name,
        model_hash=model.hash(),
        model_short_hash=model.short_hash(),
        vae_name=Path(job[core.Task].vae).name,
        strength=job[core.Network].network_strength,
        started_at=session.started_at,
        finished_at=time.time(),
        session_id=_session_id(session.folder),
        step=session.step,
        steps=session.limits.total_steps,
        epoch=length.begun(session.step),
        epochs=length.begun(length.steps),
        seed=session.seed,
        resolution=(width, height),
        clip_skip=train.train_clip_skip,
        trigger_word=images.lora_trigger_word,
        timestep_range=(train.train_min_timesteps, train.train_max_timesteps),
        learning_rate=train.train_learning_rate,
        unet_learning_rate=rates["unet"],
        text_encoder_learning_rate=rates["te1"] if any(part != "unet" for part in session.network.parts()) else None,
        optimizer=_optimizer(session) if session.limits.total_steps else "",
        scheduler=train.train_lr_scheduler,
        warmup_steps=train.train_lr_warmup_steps,
        batch_size=train.train_batch_size,
        accumulation=train.train_gradient_accumulation,
        processes=session.process.count,
        batches_per_epoch=source.batches_per_epoch,
        mirrored=images.image_mirroring,
        zero_terminal_snr=model.process.zero_snr,
        dropout=job[NetworkOptions].network_dropout,
        max_norm=job[NetworkOptions].network_max_norm,
        max_grad_norm=session.limits.max_grad_norm,
        min_snr_gamma=train.train_snr_gamma or None,
        loss=train.train_loss_function,
        loss_weighting=train.train_loss_weighting,
        mixed_precision=_PRECISION.get(model.compute, "no"),
        gradient_checkpointing=train.use_gradient_checkpointing,
        job=session.asked.to_dict(full=True),
        **network,
        **source.facts(),
    )


def _session_id(folder: Path) -> int:
    """A number for all files of a run, as kohya's scripts draw one; made of the run folder, a resumed run keeps it."""
    name = f"{folder.parent.name}/{folder.name}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _optimizer(session: Session) -> str:
    """The optimizer as kohya's scripts write it: module and class, and its settings in brackets."""
    kind = type(getattr(session.optimizer, "optimizer", session.optimizer))
    given = parse_settings(session.job[core.Train].train_optimizer_settings)
    named = ",".join(f"{name}={value}" for name, value in given.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({named})" if named else "")


_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16"}
