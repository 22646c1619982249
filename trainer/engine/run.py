"""One run from a job to a file: check, load, build, report, loop, save, give back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import TensorCache
from ..errors import AtelierError, MemoryShortageError, TrainingError
from ..events import EventLog, Finished, Opened, Preflight, Sampled, Saved
from ..models.base import Model
from ..models.load import load_model
from ..models.room import let_go
from ..params import core
from ..params.codec import load
from ..params.files import read_json, write_json
from ..params.job import Job
from ..paths import is_file
from ..places import Places
from . import arguments
from .build import PassPlan, draw_seed
from .catalogue import catalogue
from .control import Control
from .csvlog import CsvLog
from .devices import SpillWatch
from .flags import bf16_warning, training_flags
from .loop import Hooks, run_steps
from .losses import LossRing
from .output import write_network
from .passes import Passes, plan_passes
from .preflight import (
    check_before_loading,
    long_prompts,
    lora_path,
    resolve_model,
    resolve_texts,
    with_lora_files,
)  # fmt: skip
from .process import Process, this_process
from .samples import sample, write_samples
from .session import Session
from .shortage import LOADING, PREVIEW, SAVING, TRAINING, WHOLE, phase
from .site import Site
from .state import State, read_state, restore_state, write_state
from .trackers import TRACKERS

JOB_FILE = "job.json"


@dataclass(frozen=True)
class Result:
    """How a run ended: `reason` as in `events.Finished`, the LoRA (None when none was written), the run folder, the
    optimizer steps."""

    reason: str
    path: Path | None
    folder: Path | None
    report: dict[str, object]
    steps: int = 0


@dataclass
class Request:
    """What is asked of `run`. `model` is a loaded model to use in place of the job's, which `run` takes out of here so
    that nobody holds it when the run is over; `resume` a run folder; without `estimates` the report says nothing of
    memory and the run begins some seconds earlier. `device` is the one that the host draws with; None takes the best
    there is. A lent model stays on its own.
    """

    job: Job
    places: Places
    model: Model | None = None
    resume: Path | None = None
    dry: bool = False
    estimates: bool = True
    device: torch.device | None = None


def read_job(folder: Path) -> Job:
    """The job a run folder was started with; what it needed to begin may be gone. Raises TrainingError when it is not
    a run folder, JobError when its job is damaged.
    """
    path = folder / JOB_FILE
    if not is_file(path):
        raise TrainingError(f"{folder} is not a run folder: it has no {JOB_FILE}. Run folders are below logs/<date>/.")
    return load(read_json(path), catalogue(), complete=False).job


def run(request: Request, log: EventLog, control: Control | None = None) -> Result:
    """Carry out one job. Every ending is told as a Finished event; errors are raised after it was told.

    Nothing of the model is held by the error then, so that whoever lent the device finds it free.
    """
    control = control or Control()
    process = this_process(request.device)
    if not process.leads:
        log = EventLog()
    step = [0]
    began = time.perf_counter()
    try:
        device = request.model.device if request.model else process.device()
        with training_flags(device), phase(WHOLE, request.job, device):
            result = _run(request, process, log, control, step)
    except BaseException as error:
        let_go(error)
        text = str(error) if isinstance(error, AtelierError) else f"{type(error).__name__}: {error}"
        log.tell(Finished("failed", None, step[0], text))
        raise
    log.note(f"The run took {time.perf_counter() - began:.1f} s.")
    log.tell(Finished(result.reason, str(result.path) if result.path else None, step[0]))
    return result


def _run(request: Request, process: Process, log: EventLog, control: Control, step: list[int]) -> Result:
    job, places = request.job, request.places
    written = [plan.kind.suffix for plan in plan_passes(job) if plan.written]
    found = check_before_loading(job, places, written, resumed=request.resume is not None)
    job = with_lora_files(job, places.loras)
    for line in long_prompts(job, places, request.model):
        log.warn(line)
    drawn, job = job[core.Train].train_seed < 0, job.replace(train_seed=draw_seed(job))
    folder = request.resume or places.run_folder(job[core.Save].save_lora_name or "untitled", datetime.now())
    saved = read_state(folder) if request.resume else None
    model, request.model = request.model, None
    if model is None:
        with phase(LOADING, job, process.device(), partial(_file_bytes, job, places)):
            model = load_base(job, places, process, log)
    if warning := bf16_warning(model.device, model.compute):
        log.warn(warning)
    cache = TensorCache(places.cache if job[core.Images].data_cache == "disk" else None)
    site = Site(places, process, log, folder, cache, lambda: control.stopping, request.estimates)
    passes = Passes(plan_passes(job), model, site, found, drawn)
    try:
        lines = passes.survey(_resumed_pass(saved), dry=request.dry)
        log.tell(Preflight(lines))
        if request.dry:
            return Result("checked", None, None, lines)
        if process.leads:
            _open_folder(job, places, folder)
            log.tell(Opened(str(folder)))
        for plan in passes.plans:
            reason, path = _run_pass(passes, plan, saved, control, step)
            if reason != "done":
                break
        return Result(reason, path, folder, lines, step[0])
    finally:
        passes.close()


def _run_pass(
    passes: Passes, plan: PassPlan, saved: State | None, control: Control, step: list[int]
) -> tuple[str, Path | None]:
    """Carry out one pass, or take its result from where it is already. Returns (reason, LoRA file) as in `Result`."""
    log, places = passes.site.log, passes.site.places
    resumed_pass = _resumed_pass(saved)
    session = passes.begin(plan, resumed=plan.number <= resumed_pass)
    step[0] = 0
    ready = passes.fill(plan, session, resumed_pass)
    if ready:
        log.note(f"Pass {plan.number + 1} is there already, from {ready}.")
        passes.settle(plan, session, trained=False)
        return "done", _write(session, places, log) if plan.written and plan.number > resumed_pass else None
    if len(passes.plans) > 1:
        log.note(f"Pass {plan.number + 1} of {len(passes.plans)}: {session.limits.total_steps} steps.")
    ring = LossRing(passes.model.device)
    if saved and plan.number == resumed_pass:
        restore_state(session, ring, *saved)
        log.note(f"Resuming after step {session.step} of {session.limits.total_steps}.")
    try:
        with _listeners(session, log):
            reason, path = _train(session, plan, places, ring, log, control)
    finally:
        step[0] = session.step
    if reason == "done":
        passes.settle(plan, session, trained=True)
    return reason, path


def _resumed_pass(saved: State | None) -> int:
    """The pass at which a run goes on, −1 for one that starts."""
    return int(saved[1].get("pass", 0)) if saved else -1


def load_base(job: Job, places: Places, process: Process, log: EventLog) -> Model:
    """The base model a job names, stored and computed as it says. Raises JobError when there is none."""
    task, train = job[core.Task], job[core.Train]
    path = resolve_model(task.model, places.checkpoints)
    vae = resolve_model(task.vae, places.vaes, "vae") if task.vae else None
    log.note(f"Loading {path.name}.")
    model = load_model(
        path,
        vae_path=vae,
        text_paths=resolve_texts(job, places.text_encoders),
        v_pred=train.model_v_pred,
        storage=arguments.precision(train.train_model_precision, "train_model_precision"),
        vae_storage=arguments.precision(train.train_VAE_precision, "train_VAE_precision"),
        device=process.device(),
        vocabularies=places.vocabularies,
    )
    for line in model.warnings:
        log.warn(line)
    return model


def _file_bytes(job: Job, places: Places) -> int:
    """Bytes of the files of a base model."""
    path = resolve_model(job[core.Task].model, places.checkpoints)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _open_folder(job: Job, places: Places, folder: Path) -> None:
    """Make the run folder with the job in it, and the settings JSON when the job asks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JOB_FILE, job.to_dict(full=True))  # as a whole: a run that goes on needs the one it has
    if job[core.Save].save_as_json:
        write_json(places.json / folder.parent.name / f"{folder.name}.json", job.to_dict(full=True))


@contextlib.contextmanager
def _listeners(session: Session, log: EventLog) -> Iterator[None]:
    """CSV and trackers of this run, for its duration."""
    job, name = session.job, session.name
    opened: list[Any] = []
    settings = job.to_dict(full=True)
    if session.process.leads:
        opened.append(SpillWatch(session.model.device, log))
        if job[core.Log].logging_save_csv:
            header = {**settings, "model_version": session.model.family.base_version}
            opened.append(CsvLog(session.folder / f"{name}.csv", header, session.step))
        for tracker in job[core.Log].logging_trackers:
            opened.append(TRACKERS[tracker](session.folder, name, settings, session.network.mean_abs_weight))
    for listener in opened:
        log.listen(listener)
    try:
        yield
    finally:
        for listener in opened:
            log.forget(listener)
            listener.close()


def _write(session: Session, places: Places, log: EventLog, steps: str = "", final: bool = True) -> Path:
    """Write the LoRA file of a session, with `steps` at the end of its name; returns where it is."""
    path = lora_path(session.job, places, session.suffix + steps)
    if session.process.leads:
        with phase(SAVING, session.job, session.model.device), session.evaluating():
            path = write_network(session, path, log.note if final else lambda line: None)
        log.tell(Saved(str(path), session.step, final))
    return path


def _train(
    session: Session, plan: PassPlan, places: Places, ring: LossRing, log: EventLog, control: Control
) -> tuple[str, Path | None]:
    def keep(ring: LossRing) -> None:
        if session.process.leads:
            write_state(session, ring)

    def save_now() -> None:
        if plan.written:
            _write(session, places, log, f"_{session.step}steps", final=False)

    hooks = Hooks(keep=keep, save=save_now, sample=lambda: _sample(session, log))
    with phase(TRAINING, session.job, session.model.device):
        run_steps(session, control, log, ring, hooks)
    if session.step < session.limits.total_steps:
        keep(ring)
        if not control.saving:
            return "stopped", None
        return "saved_early", _write(session, places, log)
    path = _write(session, places, log, final=plan.final) if plan.written else None
    if session.limits.state_every:
        keep(ring)
    return "done", path


def _sample(session: Session, log: EventLog) -> None:
    prompts = arguments.previewed(session.job)
    if not prompts or not session.process.leads:
        return
    try:
        with phase(PREVIEW, session.job, session.model.device):
            pictures = _draw(session, prompts)
    except MemoryShortageError as error:
        log.warn(f"No preview was drawn at step {session.step}, the training goes on. {error}")
        return
    paths = write_samples(pictures, session.folder / f"samples{session.suffix}", f"{session.step:06d}")
    log.tell(Sampled(session.step, tuple(map(str, paths))))


def _draw(session: Session, prompts: Sequence[str]) -> Tensor:
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.evaluating())
        for network in session.beneath:  # whoever uses the file will not have them
            stack.enter_context(network.at_strength(0.0))
        return sample(session.model, prompts, arguments.sample_settings(session.job), text=session.kit.text)
