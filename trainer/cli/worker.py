"""What the queue and the service need of the engine: a run from the job of an entry to its file, and looks at files."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..data.dataset import arrange
from ..data.scan import scan
from ..engine import arguments
from ..engine.catalogue import catalogue
from ..engine.control import Control
from ..engine.preflight import check_before_loading
from ..engine.run import JOB_FILE, Request, read_job, run
from ..engine.state import STATE_FILE
from ..errors import DataError, JobError, Problem
from ..events import EventLog
from ..jobs.entry import Entry
from ..jobs.queue import Outcome
from ..params import core
from ..params.codec import load
from ..params.job import Job
from ..places import Places

MEGABYTE = 2**20


class Lender(Protocol):
    """What a run needs of its host."""

    def places(self) -> Places:
        """The folders."""

    def resolve(self, job: Job) -> Job:
        """The job with paths in place of names. Raises JobError."""

    def borrow(self, job: Job, log: EventLog) -> Any:
        """A context manager with the lent model, or None to read it from its file."""

    def refresh_loras(self) -> None:
        """Make a new LoRA known."""


@dataclass(frozen=True)
class Bench:
    """Carries out the jobs of the queue with the engine, in the host."""

    host: Lender

    # ---------------------------------------------------------------- for the queue

    def control(self) -> Control:
        """A new stop switch."""
        return Control()

    def can_resume(self, folder: Path) -> bool:
        """Whether a run folder holds a job and a state."""
        return (folder / STATE_FILE).is_file() and (folder / JOB_FILE).is_file()

    def run(self, entry: Entry, log: EventLog, control: Control) -> Outcome:
        """One job of the queue: the host lends what it has, gets it back however the run ends, and sees the LoRA."""
        folder = Path(entry.folder) if entry.resume else None
        job = read_job(folder) if folder is not None else self._job(entry, log)
        job = self.host.resolve(job)
        with self.host.borrow(job, log) as model:
            result = run(Request(job, self.host.places(), model=model, resume=folder), log, control)
        if result.path is not None:
            self.host.refresh_loras()
        return Outcome(result.reason, str(result.path or ""), str(result.folder or ""))

    def _job(self, entry: Entry, log: EventLog) -> Job:
        loaded = load(entry.job, catalogue())
        for line in loaded.warnings:
            log.warn(line)
        return loaded.job

    # ---------------------------------------------------------------- for the service

    def problems(self, job: Job) -> tuple[Problem, ...]:
        """What only files can tell, all at once."""
        found: list[Problem] = []
        try:
            self.host.resolve(job)
        except JobError as error:
            found += error.problems
        try:
            check_before_loading(job, self.host.places())
        except JobError as error:
            found += error.problems
        except DataError as error:
            found.append(Problem("lora_data_directory", job[core.Images].lora_data_directory, str(error)))
        return tuple(found)

    def look(self, job: Job) -> Mapping[str, object]:
        """Pictures, captions, buckets and steps of the job's data folder. Raises DataError, JobError."""
        settings = arguments.image_settings(job)
        found = scan(settings)
        arrangement = arrange(found.pictures, settings)
        size = job[core.Train].train_batch_size
        batches = sum(-(-count // size) for count in arrangement.bucket_report().values())
        total, per_epoch = arguments.steps(job, batches)
        return {**found.summary(), **arrangement.summary(), "steps per epoch": per_epoch, "steps": total}

    def memory(self) -> Mapping[str, object]:
        """What this process holds of the GPU, or without one of the machine's memory, in MB."""
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            return {"device": "GPU", "used_mb": (total - free) // MEGABYTE, "total_mb": total // MEGABYTE}
        import psutil

        used = psutil.Process().memory_info().rss
        return {
            "device": "CPU",
            "used_mb": used // MEGABYTE,
            "total_mb": psutil.virtual_memory().total // MEGABYTE,
        }
