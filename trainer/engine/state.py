"""The resume state of a run: one safetensors file, replaced as a whole, from which the next loss is the same bit for
bit.

Tensors: `network/…`, `optimizer/…`, `rng/cpu`, `rng/cuda`. Metadata: one JSON text with everything else. Data position
and random draws need no state of their own: both are functions of the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError, brief
from ..models.room import is_shortage
from ..optim.state import flatten, restore, unflatten
from ..writing import replace, why
from .flat import HALF
from .losses import LossRing
from .resume import Weights
from .session import Session

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and facts of a state file."""
STATE_FILE = "state.safetensors"
FORMAT, OLD_FORMAT = 2, 1
"""The older one says neither how the run was set up nor on which weights, and has no digest; its fingerprints summed
floating-point numbers, in an order of the device's own; half LoRAs had no float32 masters."""


_FACTS: dict[str, tuple[type, ...]] = {
    "step": (int,), "pass": (int,), "processes": (int,), "data": (str,), "loss_average": (float, int, NoneType),
    "loss_plateau": (float, int, NoneType), "optimizer": (dict,), "scheduler": (dict,), "scaler": (dict,),
}  # fmt: skip


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(told, list) and [type(one) for one in told] == [str, str] for told in value.values()
    )


_LATER: dict[str, Callable[[Any], bool]] = {
    "total": lambda value: type(value) is int, "skips": _counts, "weights": _weights,
    "job": lambda value: isinstance(value, dict), "model": lambda value: isinstance(value, str),
}  # fmt: skip
"""What states of the older format do not have, and whether a value of it is right."""


def write_state(session: Session, ring: LossRing, weights: Weights) -> Path:
    """Write the state of a session whose losses have been read. The file before it stays whole until the new one is.

    `weights`: of the base model, see `resume.weights_of`. Raises TrainingError when it cannot be written.
    """
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
        "total": session.limits.total_steps,
        "seed": session.seed,
        "job": session.asked.to_dict(full=True),
        "model": session.model.name,
        "weights": weights,
        "data": session.source.fingerprint(),
        "processes": session.process.count,
        "loss_average": ring.average,
        "loss_plateau": ring.plateau,
        "optimizer": optimizer_json,
        "scheduler": scheduler_json,
        "scaler": session.scaler.state_dict(),
        "skips": session.skips.state_dict(),
    }
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return _put(session.folder / STATE_FILE, whole, json.dumps(facts))


def _put(target: Path, tensors: dict[str, Tensor], facts: str) -> Path:
    """Write the file beside its place and move it there. Raises TrainingError; the state before it is still whole."""
    temporary = target.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"state": facts, "digest": _digest(tensors, facts)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainingError(f"The resume state cannot be written to {target.parent}: {why(error)}.") from error
    return target


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    """A SHA-256 of everything in the file."""
    digest = hashlib.sha256(facts.encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state(folder: Path) -> State:
    """(tensors, facts) of the state in a run folder. Raises TrainingError when there is none that can be trusted."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise TrainingError(
            f"{folder.name} holds no resume state ({STATE_FILE}). A run writes one every train_state_every steps "
            "and at a stop; start the job again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["state"])
            # Copies: the file's own are mapped, and Windows replaces no file that is, by the run's next state.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            given = facts["format"]
        whole = metadata.get("digest") == _digest(tensors, metadata["state"])
    except (SafetensorError, LookupError, TypeError, ValueError, OSError, RuntimeError, RecursionError) as error:
        raise TrainingError(
            f"The resume state in {folder.name} cannot be read ({error}). Start the job again."
        ) from error
    if given not in (OLD_FORMAT, FORMAT):
        raise TrainingError(
            f"The resume state in {folder.name} has format {brief(given)}, this version reads {FORMAT}."
        )
    if not whole and not (given == OLD_FORMAT and "digest" not in metadata):
        raise TrainingError(
            f"The resume state in {folder.name} is damaged: its contents are not those that were written. Put "
            f"{STATE_FILE} from a copy, or start the job again."
        )
    wrong = [key for key, kinds in _FACTS.items() if type(facts.get(key)) not in kinds]
    wrong += [key for key, fits in _LATER.items() if key in facts and not fits(facts[key])]
    if wrong:
        raise TrainingError(f"The resume state in {folder.name} is damaged: {', '.join(wrong)}. Start the job again.")
    return tensors, facts


def comparable(facts: dict[str, Any]) -> bool:
    """Whether the fingerprints in a state were made as they are now."""
    return bool(facts["format"] != OLD_FORMAT)


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Raise TrainingError for what fails in the block because a resume state is not what this run needs.

    The shapes that an optimizer keeps are its library's own affair: some misfits show in the first step alone.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        if is_shortage(error):
            raise
        raise TrainingError(
            f"The resume state does not fit this run ({type(error).__name__}: {error}). It is of other settings, of "
            "other versions of the optimizers, or damaged. Start the job again."
        ) from error


def restore_state(session: Session, ring: LossRing, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a freshly built session where the state left off. Raises TrainingError when data or job are not the same.

    Where the run is longer than the one that wrote the state, the schedule is taken to where it would be in the longer
    one.
    """
    if comparable(facts) and facts["data"] != session.source.fingerprint():
        raise TrainingError(
            "The images, captions or image settings changed since this run was stopped. Start the job again."
        )
    if facts["processes"] != session.process.count:
        raise TrainingError(f"The run used {facts['processes']} process(es), now there are {session.process.count}.")
    if facts["step"] > session.limits.total_steps:
        raise TrainingError(
            f"The run has done {facts['step']} steps already, and {session.limits.total_steps} are asked for. Ask for "
            "more (train_iterations, or train_epochs)."
        )
    with fitting():
        _restore(session, tensors, facts)
    session.restored = True
    ring.average, ring.plateau = facts["loss_average"], facts["loss_plateau"]
    session.step = facts["step"]


def _restore(session: Session, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    with torch.no_grad(), session.flat.exact():
        for key, value in session.network.state_dict(keep_vars=True).items():
            held = tensors[f"network/{key}"]
            if held.shape != value.shape:
                raise ValueError(f"{key} has the shape {tuple(held.shape)}, not {tuple(value.shape)}")
            value.copy_(held)
    session.flat.publish()
    schedule = unflatten(part("scheduler/"), facts["scheduler"])
    longer = facts.get("total", session.limits.total_steps) != session.limits.total_steps
    moved = session.scheduler.forward(schedule) if longer else ()
    restore(session.optimizer, unflatten(_moments(part("optimizer/"), facts), facts["optimizer"]))
    if longer:
        for group, settings in zip(session.optimizer.param_groups, moved, strict=True):
            group.update(settings)
    else:
        session.scheduler.load_state_dict(schedule)
    session.scaler.load_state_dict(facts["scaler"])
    session.skips.load_state_dict(facts.get("skips", {}))
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _moments(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's tensors; those of a state from before there were float32 masters in float32 as well."""
    if facts["format"] != OLD_FORMAT:
        return tensors
    return {key: value.float() if value.dtype in HALF else value for key, value in tensors.items()}
