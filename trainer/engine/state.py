"""The resume state of a run: one safetensors file, replaced as a whole, from which the next loss is the same bit for
bit.

Tensors: `network/…`, `optimizer/…`, `rng/cpu`, `rng/cuda`. Metadata: one JSON text with everything else. Data position
and random draws need no state of their own: both are functions of the step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError
from ..optim.state import flatten, restore, unflatten
from .flat import HALF
from .losses import LossRing
from .session import Session

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and facts of a state file."""
STATE_FILE = "state.safetensors"
FORMAT = 1


def write_state(session: Session, ring: LossRing) -> Path:
    """Write the state of a session whose losses have been read. The file before it stays whole until the new one is."""
    with session.flat.exact():
        tensors: dict[str, Tensor] = {f"network/{key}": value for key, value in session.network.state_dict().items()}
    optimizer_tensors, optimizer_json = flatten(session.optimizer.state_dict())
    tensors.update({f"optimizer/{key}": value for key, value in optimizer_tensors.items()})
    scheduler_tensors, scheduler_json = flatten(session.scheduler.state_dict())
    tensors.update({f"scheduler/{key}": value for key, value in scheduler_tensors.items()})
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    facts = {
        "format": FORMAT,
        "step": session.step,
        "pass": session.number,
        "seed": session.seed,
        "data": session.source.fingerprint(),
        "processes": session.process.count,
        "loss_average": ring.average,
        "loss_plateau": ring.plateau,
        "optimizer": optimizer_json,
        "scheduler": scheduler_json,
        "scaler": session.scaler.state_dict(),
        "skips": session.skips.state_dict(),
    }
    target = session.folder / STATE_FILE
    temporary = target.with_suffix(".tmp")
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(whole, temporary, metadata={"state": json.dumps(facts)})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return target


def read_state(folder: Path) -> State:
    """(tensors, facts) of the state in a run folder. Raises TrainingError when there is none that can be trusted."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise TrainingError(
            f"{folder.name} holds no resume state ({STATE_FILE}). A run writes one every train_state_every steps "
            "and at a stop; start the job anew."
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise TrainingError(
            f"The resume state in {folder.name} cannot be read ({error}). Start the job anew."
        ) from error
    if facts.get("format") != FORMAT:
        raise TrainingError(
            f"The resume state in {folder.name} has format {facts.get('format')}, this version reads {FORMAT}."
        )
    return tensors, facts


def restore_state(session: Session, ring: LossRing, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a freshly built session where the state left off. Raises TrainingError when data or job are not the same."""
    if facts["data"] != session.source.fingerprint():
        raise TrainingError(
            "The pictures, captions or image settings changed since this run was stopped. Start the job anew."
        )
    if facts["processes"] != session.process.count:
        raise TrainingError(f"The run used {facts['processes']} process(es), now there are {session.process.count}.")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    with torch.no_grad(), session.flat.exact():
        for key, value in session.network.state_dict(keep_vars=True).items():
            value.copy_(tensors[f"network/{key}"])
    session.flat.publish()
    restore(session.optimizer, unflatten(_moments(part("optimizer/"), facts), facts["optimizer"]))
    session.scheduler.load_state_dict(unflatten(part("scheduler/"), facts["scheduler"]))
    session.scaler.load_state_dict(facts["scaler"])
    session.skips.load_state_dict(facts.get("skips", {}))
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    ring.average, ring.plateau = facts["loss_average"], facts["loss_plateau"]
    session.step = facts["step"]


def _moments(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's tensors; those of a state from before there were float32 masters in float32 as well."""
    if "skips" in facts:
        return tensors
    return {key: value.float() if value.dtype in HALF else value for key, value in tensors.items()}
