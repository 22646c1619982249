"""What the queue and the service need of the engine: a run from the job of an entry to its file, looks at files, and
pictures where the host draws none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..data.dataset import arrange
from ..data.pairs import originals_of
from ..data.plan import Plan, filled
from ..data.scan import scan
from ..engine import arguments, costs
from ..engine.catalogue import catalogue
from ..engine.control import Control
from ..engine.costs import CostWatch
from ..engine.folder import JOB_FILE
from ..engine.packages import unserved
from ..engine.preflight import file_problems
from ..engine.process import this_process
from ..engine.resume import amend, read_job
from ..engine.run import Request, run
from ..engine.state import STATE_FILE
from ..errors import JobError, Problem
from ..events import EventLog
from ..jobs.entry import Entry
from ..jobs.listing import QueueError
from ..jobs.queue import Outcome
from ..modes.base import MODES
from ..params import core
from ..params.codec import beside, load
from ..params.job import Job
from ..paths import is_file
from ..places import Places
from ..ui.wish import Wish
from .draw import Easel, as_trained

MEGABYTE = 2**20


class Lender(Protocol):
    """What a run needs of its host."""

    def places(self) -> Places:
        """The folders."""

    def resolve(self, job: Job) -> Job:
        """The job with paths in place of names. Raises JobError."""

    def device(self) -> Any:
        """The torch device the host computes on; None for the best there is."""

    def borrow(self, job: Job, log: EventLog) -> Any:
        """A context manager with the lent model, or None to read it from its file."""

    def refresh_loras(self) -> None:
        """Make a new LoRA known."""

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """A picture, or None when the host draws none."""


class Bench:
    """Carries out the jobs of the queue with the engine, in the host. Drawing and training take turns."""

    def __init__(self, host: Lender) -> None:
        self.host = host
        self._turn = threading.Lock()
        self._easel = Easel()

    # ---------------------------------------------------------------- for the queue

    def control(self) -> Control:
        """A new stop switch."""
        return Control()

    def can_resume(self, folder: Path) -> bool:
        """Whether a run folder holds a job and a state."""
        return is_file(folder / STATE_FILE) and is_file(folder / JOB_FILE)

    def amend(self, folder: Path, values: Mapping[str, object]) -> Mapping[str, object]:
        """Give a run that goes on other settings, of those it may change; all its settings come back. Raises JobError,
        TrainingError.
        """
        return amend(folder, values).to_dict(full=True)

    def run(self, entry: Entry, log: EventLog, control: Control) -> Outcome:
        """One job of the queue: the host lends what it has, gets it back however the run ends, and sees the LoRA."""
        folder = Path(entry.folder) if entry.resume else None
        job = read_job(folder) if folder is not None else self._job(entry, log)
        job = self.host.resolve(self._with_loras(job))
        with self._turn:
            self._easel.clear()
            with self.host.borrow(job, log) as lent, self._watched(job, log, entry):
                request = Request(job, self.host.places(), model=lent, resume=folder, device=self.host.device())
                del lent  # only `run` may hold it, so that its memory is free when the host takes its models back
                result = run(request, log, control)
        if result.path is not None:
            self._show_lora(log)
        return Outcome(result.reason, str(result.path or ""), str(result.folder or ""))

    def _show_lora(self, log: EventLog) -> None:
        """Make a new LoRA known to the host. It is written; a fault in the host's own code does not undo that."""
        try:
            self.host.refresh_loras()
        except Exception as error:
            log.warn(f"The list of LoRAs could not be refreshed ({error}). Refresh it in the WebUI.")

    @contextlib.contextmanager
    def _watched(self, job: Job, log: EventLog, entry: Entry) -> Iterator[None]:
        """Keep what the run takes, to be told before the next of its kind; a resumed one is only a part."""
        if entry.resume:
            yield
            return
        watch = CostWatch(job, self._device(), self.host.places().cache, entry.started, log.warn)
        log.listen(watch)
        try:
            yield
        finally:
            log.forget(watch)

    def _device(self) -> Any:
        """The device that runs and pictures are computed on."""
        return this_process(self.host.device()).device()

    def _job(self, entry: Entry, log: EventLog) -> Job:
        loaded = load(entry.job, catalogue())
        for line in loaded.warnings:
            log.warn(line)
        return loaded.job

    def _with_loras(self, job: Job) -> Job:
        """The job with paths in place of names of the LoRA folder; what is no such name stays."""
        found: dict[str, object] = {}
        for parameter in catalogue().parameters:
            name = str(job.value(parameter.attribute)) if parameter.spec.holds == "lora" else ""
            path = self.host.places().loras / name
            if name and not is_file(Path(name)) and is_file(path):
                found[parameter.attribute] = str(path)
        return job.replace(**found)

    # ---------------------------------------------------------------- for the service

    def problems(self, job: Job) -> tuple[Problem, ...]:
        """What only files can tell, all at once."""
        found: list[Problem] = []
        try:
            job = self.host.resolve(job)
        except JobError as error:
            found += error.problems
        return (*found, *beside(file_problems(self._with_loras(job), self.host.places(), models=not found), found))

    def look(self, job: Job) -> Mapping[str, object]:
        """Pictures, captions, buckets and steps of the job's data folder. Raises DataError, JobError."""
        settings = arguments.image_settings(job)
        found = scan(settings)
        arrangement = arrange(found.pictures, settings)
        size = job[core.Train].train_batch_size
        counted = arrangement
        if "pair_name" in MODES.get(job[core.Task].mode).needs:  # two pictures are one sample
            pairs = originals_of(found.pictures, job[core.Images].diff_target_name)
            counted = arrange(pairs or found.pictures, settings)
        pools = [range(count) for count in counted.bucket_report().values()]
        plan = Plan([filled(pool, size) if arguments.fills(job) else pool for pool in pools], 0, size)
        length = arguments.length(job, plan.batches_per_epoch)
        per_epoch = round(length.steps_per_epoch, 2)
        return {**found.summary(), **arrangement.summary(), "steps per epoch": per_epoch, "steps": length.steps}

    def unserved(self) -> Mapping[str, Mapping[str, str]]:
        """Setting → value that the installed packages or the device cannot serve → why (`engine.packages`)."""
        return unserved(self._device())

    def cost(self, job: Job) -> Mapping[str, object]:
        """Steps, seconds and memory that the job will take, as far as they are known."""
        try:
            found = costs.known(self.host.resolve(job), self._device(), self.host.places().cache)
        except JobError:  # told at its field when it is started
            found = None
        return costs.plain(job, found)

    def picture(self, wish: Wish) -> Any:
        """The PIL picture of a wish, drawn by the host with its loaded model, or else by our own sampler. Raises
        AtelierError.
        """
        worn = f" <lora:{Path(wish.lora).stem}:{wish.strength:g}>" if wish.lora and wish.strength else ""
        drawn = self.host.txt2img(wish.prompt + worn, wish.negative, wish.seed, wish.size, wish.steps, wish.cfg)
        if drawn is not None:
            return drawn
        lora = self._lora(wish.lora) if wish.lora else None
        wish = wish if lora is None else as_trained(wish, lora)
        raw = {"format": 1, "mode": "LoRA", "model": wish.model, "vae": wish.vae, "te": wish.te}
        task = self.host.resolve(load(raw, catalogue(), complete=False).job)[core.Task]
        if not self._turn.acquire(blocking=False):
            raise QueueError("A training is running or an image is being generated. Try again when it has ended.")
        try:
            return self._easel.draw(wish, lora, task, self._device())
        finally:
            self._turn.release()

    def _lora(self, name: str) -> Path:
        folder = self.host.places().loras
        for path in folder.rglob("*.safetensors"):
            if path.relative_to(folder).as_posix() == name or path.stem == name:
                return path
        raise JobError([Problem("lora", name, "is not in the LoRA folder. Choose one of the list.")])

    def memory(self) -> Mapping[str, object]:
        """What this process holds of the GPU, or without one of the machine's memory, in MB."""
        import torch

        device = self._device()
        if device.type == "cuda" and torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info(device)
            return {"device": "GPU", "used_mb": (total - free) // MEGABYTE, "total_mb": total // MEGABYTE}
        import psutil

        used = psutil.Process().memory_info().rss
        return {
            "device": "CPU",
            "used_mb": used // MEGABYTE,
            "total_mb": psutil.virtual_memory().total // MEGABYTE,
        }
