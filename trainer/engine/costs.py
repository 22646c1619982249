"""What a run will cost: what the last one of its kind took before its first step and for each step, and its memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from ..events import Event, Finished, Preflight, Step
from ..jsontext import JsonError, read_object
from ..models.room import Peak
from ..modes.base import MODES
from ..params import core
from ..params.job import Job
from ..writing import why, write_whole
from .arguments import has_epochs
from .passes import plan_passes
from .preflight import MEMORY

_DECIDES = (
    *("network_type", "network_rank", "network_blocks", "network_element", "network_targets", "use_dora"),
    *("image_size", "train_batch_size", "train_gradient_accumulation", "use_gradient_checkpointing"),
    *("train_model_precision", "train_lora_precision", "train_optimizer", "sample_every", "sample_steps"),
    "prior_batch_size",
)
"""Settings that decide how long a step takes."""
_SWITCHES = (
    *("diff_project", "diff_alt_ratio", "ileco_anchor_weight", "ileco_guidance", "ileco_bank"),
    *("prior_loss_weight", "lalora_lambda", "abm_enabled"),
)
"""Settings of which only matters whether they are zero."""


@dataclass(frozen=True)
class Cost:
    """What the last run of a kind took: `before` the first step and `per_step` in seconds; its memory at the peak as
    measured, or as estimated where the device does not count.
    """

    before: float
    per_step: float
    memory_mb: int


def steps_of(job: Job) -> int | None:
    """Optimizer steps of all passes; None where only the pictures tell them."""
    if not MODES.get(job[core.Task].mode).steps:
        return 0
    passes = [plan.job[core.Train] for plan in plan_passes(job)]
    if has_epochs(job) and any(train.train_epochs for train in passes):
        return None
    return sum(train.train_iterations for train in passes)


def known(job: Job, device: torch.device, folder: Path) -> Cost | None:
    """What the last run of this kind took; None when there was none. `job` has paths in place of names."""
    try:
        raw = read_object(_file(job, device, folder))
    except JsonError:  # none yet, or damaged: the next run writes it anew
        return None
    before, per_step, memory = (raw.get(name) for name in ("before", "per_step", "memory_mb"))
    if not (_usual(before) and _usual(per_step) and _usual(memory)):
        return None
    return Cost(float(before), float(per_step), int(memory))


def _usual(number: object) -> TypeGuard[float]:
    """Whether this is a number of seconds or megabytes that something can have taken."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < 1e12


def _silent(line: str) -> None:
    """Nobody hears it."""


class CostWatch:
    """Listens to one run and, when it ends well, keeps what it took for `known`."""

    def __init__(
        self, job: Job, device: torch.device, folder: Path, began: float, warn: Callable[[str], None] = _silent
    ) -> None:
        """`began`: the unix time in seconds at which the run was asked for; `warn` hears when nothing can be kept."""
        self._warn = warn
        self._file, self._began = _file(job, device, folder), began
        self._ready = self._last = 0.0
        self._steps = self._at = self._total = self._memory = 0
        self._peak = Peak(device)

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, Preflight):
            phases = event.report.get(MEMORY)
            self._ready = event.at
            self._memory = max(phases.values(), default=0) if isinstance(phases, dict) else 0
        elif isinstance(event, Step):
            again = event.step <= self._at or event.total != self._total  # a later pass counts anew
            self._steps += event.step if again else event.step - self._at
            self._at, self._total, self._last = event.step, event.total, event.at
        elif isinstance(event, Finished) and event.reason in ("done", "saved_early") and self._ready:
            self._keep(event.at)

    def _keep(self, end: float) -> None:
        measured = self._peak.bytes
        memory = self._memory if measured is None else round(measured / 2**20)
        cost = Cost(end - self._began, 0.0, memory)
        if self._steps:
            cost = Cost(self._ready - self._began, (self._last - self._ready) / self._steps, memory)
        try:
            write_whole(self._file, json.dumps(asdict(cost)).encode("ascii"))
        except OSError as error:
            self._warn(f"What this run took cannot be noted in {self._file.parent}: {why(error)}.")


def _file(job: Job, device: torch.device, folder: Path) -> Path:
    task = job[core.Task]
    facts: dict[str, object] = {"mode": task.mode, "model": Path(task.model).name, "device": str(device)}
    for number, plan in enumerate(plan_passes(job)):
        facts |= {f"{name} {number}": plan.job.value(name) for name in _DECIDES}
        facts |= {f"{name} {number}": bool(plan.job.value(name)) for name in _SWITCHES}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return folder / f"cost-{name}.json"


def plain(job: Job, cost: Cost | None) -> Mapping[str, object]:
    """For the page: `steps`, `before`, `per_step`, `memory_mb`; None for what is not known."""
    told = asdict(cost) if cost is not None else dict.fromkeys(("before", "per_step", "memory_mb"))
    return {"steps": steps_of(job), **told}
