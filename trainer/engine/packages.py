"""Values of settings that the installed packages, or the device, cannot serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping

import torch

from ..errors import MissingPackageError, Problem
from ..modes.base import MODES
from ..optim.optimizers import OPTIMIZERS, distribution
from ..params.core import Log, Task, Train
from ..params.job import Job

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}


def unserved(device: torch.device | None = None) -> dict[str, dict[str, str]]:
    """Key of a setting → value in it that cannot be used here → why, and the command that installs what is missing.

    `device`: the one the training will compute on; None leaves out what depends on it. Looks only whether packages are
    there and imports none of them, so that a page can ask at every load.
    """
    found: dict[str, dict[str, str]] = {"train_optimizer": {}, "logging_trackers": {}}
    for name, traits in OPTIMIZERS.items():
        if traits.needs_cuda and device is not None and device.type != "cuda":
            found["train_optimizer"][name] = f"needs an NVIDIA GPU, and this computes on {device}."
        elif not _there(traits.package):
            found["train_optimizer"][name] = MissingPackageError.told(distribution(traits.package))
    for name, package in _TRACKERS.items():
        if not _there(package):
            found["logging_trackers"][name] = MissingPackageError.told(package)
    return {key: values for key, values in found.items() if values}


def unserved_problems(job: Job) -> Iterator[Problem]:
    """What a job asks for that is not installed, at its fields."""
    missing: Mapping[str, Mapping[str, str]] = unserved()
    for one in (job, job.second):
        if one is None or not MODES.get(job[Task].mode).steps:  # a mode that takes none shows no optimizer
            continue
        name = OPTIMIZERS.canonical(one[Train].train_optimizer)
        if name in missing.get("train_optimizer", {}):
            yield Problem("train_optimizer", name, missing["train_optimizer"][name])
    for name in job[Log].logging_trackers:
        if name in missing.get("logging_trackers", {}):
            yield Problem("logging_trackers", name, missing["logging_trackers"][name])


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module put in its place by somebody, without a spec
        return False
