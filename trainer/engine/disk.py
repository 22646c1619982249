"""Whether the disk takes what a run will write: every folder is tried by writing a file, and the room is compared."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from ..adapters.network import Network
from ..errors import AtelierError, JobError, Problem
from ..events import EventLog
from ..params import core
from ..params.job import Job
from ..places import Places
from ..writing import draft, why
from . import arguments
from .build import PassPlan, make_network
from .session import Session

_TRIED = b"\0" * 4096
_MEGABYTE = 2**20
_HEADER, _ENTRY, _ROW, _PIXEL = 65_536, 150, 100, 2
"""Bytes of a file's metadata, of a tensor's name there, of a row of the log, and of a pixel of a preview (PNG)."""
_USUAL_RANK, _LARGE_RANK = 16, 64
"""A LoRA of the large rank takes less room than its base model; one of another rank in proportion."""
_ADVICE = {
    "save_lora_name": "save fewer intermediate files",
    "train_state_every": "set train_state_every = 0",
    "sample_every": "generate fewer previews",
}


def folder_problems(job: Job, places: Places) -> Iterator[Problem]:
    """A problem for every folder of this run that cannot be written. What is made to try it is removed again."""
    save, today = job[core.Save], places.run_folder("run", datetime.now()).parent
    tried = [
        ("save_lora_name", save.save_lora_name, "LoRA", places.loras),
        ("train_state_every", job[core.Train].train_state_every, "run", today),
    ]
    if save.save_as_json:
        tried.append(("save_as_json", True, "settings", places.json / today.name))
    for field, value, what, folder in tried:
        reason = refusal(folder)
        if reason:
            message = f"the folder of {what} files, {folder}, cannot be written: {reason}. Free it or choose another."
            yield Problem(field, value, message)


def refusal(folder: Path) -> str:
    """Why no file can be written to a folder, which may still have to be made; "" when one can."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with draft(folder / "written to try the folder") as made:
            made.file.write(_TRIED)
            made.file.flush()
    except (OSError, ValueError) as error:
        return why(error)
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody else uses it already
                path.rmdir()
    return ""


@dataclass(frozen=True)
class Share:
    """Bytes that a run still writes below a folder; `field` is the setting that decides most of them."""

    field: str
    value: object
    what: str
    folder: Path
    size: int


def shares(plan: PassPlan, session: Session, places: Places) -> list[Share]:
    """What one pass writes: LoRA files, states with the log, previews. A state is there twice while it is replaced."""
    job, limits = session.job, session.limits
    values = list(session.network.state_dict().values())
    stored = arguments.precision(job[core.Save].save_precision, "save_precision") or session.model.storage
    one = _HEADER + len(values) * _ENTRY + _bytes_of(session.network, stored)
    files = 1 + sum(step > session.step for step in limits.save_steps) if plan.written else 0
    trained = sum(flat.numel() for flat in session.flat.values) * 4
    # Most optimizers keep two moments and a counter of each parameter.
    state = _HEADER + 4 * len(values) * _ENTRY + sum(value.numel() for value in values) * 4 + 2 * trained
    states = 0 if not limits.total_steps else 2 if 0 < limits.state_every < limits.total_steps else 1
    drawn = limits.total_steps // limits.sample_every if limits.sample_every else 0
    height, width = job[core.Images].image_size
    previews = drawn * len(arguments.previewed(job)) * height * width * _PIXEL
    save, train, sample = job[core.Save], job[core.Train], job[core.Sample]
    return [
        Share("save_lora_name", save.save_lora_name, f"{files} LoRA files", places.loras, files * one),
        Share("train_state_every", train.train_state_every, "states", places.logs,
              states * state + limits.total_steps * _ROW),
        Share("sample_every", sample.sample_every, "previews", places.logs, previews),
    ]  # fmt: skip


def file_room_problems(job: Job, places: Places, model: Path) -> Iterator[Problem]:
    """A problem when the disk has not even room for one LoRA file of this job on the base model at `model`.

    Its layers are read, not its weights, and only where the disk is so full that it matters; `check_room` knows the
    whole need once the model is loaded.
    """
    free = _free(places.loras)
    share = max(job[core.Network].network_rank, _USUAL_RANK) / _LARGE_RANK
    if free is None or free > share * file_bytes(model):
        return
    from ..models.load import load_model  # its libraries take seconds, and few disks are so full

    try:
        base = load_model(model, device="meta")  # nothing is computed: its weights stay in the mapped file
        network = make_network(job, base, 0, EventLog(), restored=True)
        stored = arguments.precision(job[core.Save].save_precision, "save_precision") or base.storage
    except AtelierError:  # loading says what is wrong with the model
        return
    need = _bytes_of(network, stored)  # nothing is added: no run that would fit is refused
    if need > free:
        message = (
            f"the disk of {places.loras} has {_megabytes(free)} free, and one LoRA file of these settings takes "
            f"{_megabytes(need)}. Make room, or choose another folder or a lower network_rank."
        )
        yield Problem("save_lora_name", job[core.Save].save_lora_name, message)


def file_bytes(model: Path) -> int:
    """Bytes of the files of a base model; 0 for what cannot be looked at."""
    try:
        files = model.rglob("*.safetensors") if model.is_dir() else [model]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _bytes_of(network: Network, stored: torch.dtype) -> int:
    return sum(value.numel() for value in network.state_dict().values()) * stored.itemsize


def check_room(wanted: Iterable[Share]) -> None:
    """Raise JobError, with a problem at each field, when a disk has less room than will be written to it."""
    by_disk: dict[object, list[Share]] = {}
    for share in wanted:
        if share.size:
            by_disk.setdefault(_disk(share.folder), []).append(share)
    problems = []
    for held in by_disk.values():
        need, free = sum(share.size for share in held), _free(held[0].folder)
        if free is not None and need > free:
            told = ", ".join(f"{share.what} {_megabytes(share.size)}" for share in held)
            for share in held:
                if share.size < need / 20:  # less of it would not help
                    continue
                message = (
                    f"the disk of {share.folder} has {_megabytes(free)} free, and this run needs {_megabytes(need)} "
                    f"there ({told}). Make room, {_ADVICE[share.field]}, or choose another folder."
                )
                problems.append(Problem(share.field, share.value, message))
    if problems:
        raise JobError(problems)


def _megabytes(size: int) -> str:
    return f"{size / _MEGABYTE:.1f} MB"


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.parents) if os.path.isdir(path)), folder)


def _disk(folder: Path) -> object:
    with contextlib.suppress(OSError):
        return os.stat(_existing(folder)).st_dev
    return folder


def _free(folder: Path) -> int | None:
    """Bytes that are free to us; None where the system does not say."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(_existing(folder)).free
    return None
