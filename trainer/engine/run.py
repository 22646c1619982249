"""One run from a job to a file: check, load, build, report, loop, save, give back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from ..data.cache import TensorCache
from ..errors import AtelierError, DataError, MemoryShortageError, TrainingError
from ..events import EventLog, Finished, Opened, Preflight
from ..models.base import Model
from ..models.load import load_model
from ..models.room import let_go
from ..modes.base import MODES
from ..params import core
from ..params.files import json_bytes
from ..params.job import Job
from ..places import Places
from ..writing import sweep, why, write_new
from . import arguments
from .build import PassPlan, draw_seed
from .control import Control
from .disk import check_room, file_bytes
from .estimate import needed
from .flags import bf16_warning, training_flags
from .folder import RunFolder, new_folder, open_folder
from .keeping import Keeper
from .loop import Hooks, run_steps, tell
from .losses import LossRing
from .passes import Passes, plan_passes
from .preflight import (
    check_before_loading,
    cut_to_one_shape,
    left_out,
    long_prompts,
    resolve_model,
    resolve_texts,
    too_few_copies,
    with_lora_files,
)  # fmt: skip
from .preview import Previewer
from .process import Process, this_process
from .resume import Weights, check_state_job, check_weights, weights_of
from .session import Session
from .shortage import LOADING, TRAINING, WHOLE, phase
from .site import Site
from .state import State, comparable, read_state, restore_state


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
        with training_flags(device), phase(WHOLE, device, request.job), _files():
            result = _run(request, process, log, control, step)
    except BaseException as error:
        request.model = None
        let_go(error)
        text = str(error) if isinstance(error, AtelierError) else f"{type(error).__name__}: {error}"
        log.tell(Finished("failed", None, step[0], text))
        raise
    log.note(f"The run took {time.perf_counter() - began:.1f} s.")
    log.tell(Finished(result.reason, str(result.path) if result.path else None, step[0]))
    return result


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """Say of a file that cannot be read or written which it is and why. Raises TrainingError."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        message = f"The run had to end: {name}{why(error)}. Make room or free the file; a saved state can be resumed."
        raise TrainingError(message) from error


def _run(request: Request, process: Process, log: EventLog, control: Control, step: list[int]) -> Result:
    job, places = request.job, request.places
    written = [plan.kind.suffix for plan in plan_passes(job) if plan.written and process.leads]
    try:
        found = check_before_loading(
            job, places, written, resumed=request.resume is not None, models=request.model is None
        )
    except DataError as error:
        if request.resume is None:
            raise
        hint = "If the data were moved, resume with lora_data_directory = the new place (--set on the command line)."
        raise DataError(f"{error} {hint}") from error
    job = with_lora_files(job, places.loras)
    of_data = (*left_out(found), *too_few_copies(job, found), *cut_to_one_shape(job, found))
    for line in (*of_data, *long_prompts(job, places, request.model)):
        log.warn(line)
    drawn, job = job[core.Train].train_seed < 0, job.replace(train_seed=draw_seed(job))
    name = job[core.Save].save_lora_name or "untitled"
    with contextlib.ExitStack() as stack:
        held: RunFolder | None = None
        if process.leads and not request.dry:
            held = open_folder(request.resume) if request.resume else new_folder(places, name)
            stack.callback(held.close)
        saved = read_state(request.resume) if request.resume else None
        if saved is not None:
            check_state_job(saved[1], job)
        folder = request.resume or (held.path if held else places.run_folder(name, datetime.now()))
        model, request.model = request.model, None
        if model is None:
            with phase(LOADING, process.device(), job, partial(_base_bytes, job, places)):
                model = load_base(job, places, process, log)
        if warning := bf16_warning(model.device, model.compute):
            log.warn(warning)
        weights = {} if request.dry and saved is None else weights_of(model)
        if saved is not None:
            check_weights(saved[1], weights, model.name, _parts_in_use(job, weights))
        cache = TensorCache(places.cache if job[core.Images].data_cache == "disk" else None, warn=log.warn)
        site = Site(places, process, log, folder, cache, lambda: control.stopping, request.estimates)
        passes = Passes(plan_passes(job), model, site, found, drawn)
        stack.callback(passes.close)
        lines = passes.survey(_resumed_pass(saved), dry=request.dry)
        log.tell(Preflight(lines))
        check_room(passes.shares)
        if request.dry:
            return Result("checked", None, None, lines)
        kept = Kept(held, job, weights, step)
        if held is not None:
            sweep(places.loras)
            log.tell(Opened(str(folder)))
            if saved is None:
                kept.settings(places, log)
        for plan in passes.plans:
            reason, path = _run_pass(passes, plan, saved, control, kept)
            if reason != "done":
                break
        return Result(reason, path, folder, lines, step[0])


def _parts_in_use(job: Job, parts: Collection[str]) -> set[str]:
    """The parts of the base model that decide how a run goes on: all but the VAE of a mode without images."""
    source = MODES.get(job[core.Task].mode).passes()[0].source
    return set(parts) - ({"vae"} if source == "prompts" else set())


@dataclass(frozen=True)
class Kept:
    """What all passes of a run share: its folder (None where another process leads), its job, the weights of the base
    model, and the optimizer steps of the last pass.
    """

    folder: RunFolder | None
    job: Job
    weights: Weights
    step: list[int]

    def settings(self, places: Places, log: EventLog) -> None:
        """Write the job into the run folder, and the settings JSON. Raises TrainingError. A run that goes on does so
        once its state is accepted: one that is refused leaves its folder as it was.
        """
        if self.folder is not None:
            self.folder.keep_job(self.job)
            _keep_settings(self.job, places, self.folder.path, log)


def _run_pass(
    passes: Passes, plan: PassPlan, saved: State | None, control: Control, kept: Kept
) -> tuple[str, Path | None]:
    """Carry out one pass, or take its result from where it is already. Returns (reason, LoRA file) as in `Result`."""
    log, places = passes.site.log, passes.site.places
    resumed_pass = _resumed_pass(saved)
    session = passes.begin(plan, resumed=plan.number <= resumed_pass)
    kept.step[0] = 0
    keeper = Keeper(session, kept.folder, kept.weights, places, log, passes.keep_results)
    ready = passes.fill(plan, session, resumed_pass)
    if ready:
        log.note(f"Pass {plan.number + 1} is there already, from {ready}.")
        passes.settle(plan, session, trained=False)
        return "done", keeper.lora() if plan.written and plan.number > resumed_pass else None
    if len(passes.plans) > 1:
        log.note(f"Pass {plan.number + 1} of {len(passes.plans)}: {session.limits.total_steps} steps.")
    ring = LossRing(passes.model.device)
    if saved and plan.number == resumed_pass:
        restore_state(session, ring, *saved)
        kept.settings(places, log)
        if not comparable(saved[1]):
            log.warn(
                "This run was started by an older version, which identified model and images in another way: it is not "
                "checked whether they are still the same."
            )
        log.note(f"Resuming after step {session.step} of {session.limits.total_steps}.")
    try:
        with keeper.listeners():
            reason, path = _train(session, plan, ring, keeper, log, control)
    finally:
        kept.step[0] = session.step
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


def _base_bytes(job: Job, places: Places) -> int:
    return file_bytes(resolve_model(job[core.Task].model, places.checkpoints))


def _keep_settings(job: Job, places: Places, folder: Path, log: EventLog) -> None:
    """Write the settings JSON when the job asks for it; one of other settings is kept."""
    if not job[core.Save].save_as_json:
        return
    path = places.json / folder.parent.name / f"{folder.name}.json"
    try:
        write_new(path, json_bytes(job.to_dict(full=True)))
    except OSError as error:
        log.warn(f"The settings cannot be written to {path}: {why(error)}. The run continues; its folder has them too.")


def _train(
    session: Session, plan: PassPlan, ring: LossRing, keeper: Keeper, log: EventLog, control: Control
) -> tuple[str, Path | None]:
    def save() -> None:
        if plan.written:
            keeper.copy()

    def keep(ring: LossRing) -> None:
        keeper.state(ring)

    hooks = Hooks(keep=keep, save=save, sample=Previewer(session, log, keeper.cache))
    try:
        with phase(TRAINING, session.model.device, session.job, partial(needed, session, keeper.cache, TRAINING)):
            run_steps(session, control, log, ring, hooks)
    except MemoryShortageError as error:
        if not session.between or session.process.count > 1:
            raise
        tell(session, ring, log)
        if keeper.state(ring):
            raise
        raise MemoryShortageError(f"{error} The state after step {session.step} is kept: resume the run.") from None
    except DataError:  # between two steps: an entry of the cache is gone
        tell(session, ring, log)
        keeper.state(ring)
        raise
    unkept = keeper.state(ring)  # before the file: where that cannot be written, this is what the run goes on from
    if session.step < session.limits.total_steps:
        if control.saving:
            return "saved_early", keeper.last_lora(unkept, final=True)
        if unkept:
            raise TrainingError(f"The run was stopped at step {session.step}, but {unkept[:1].lower()}{unkept[1:]}")
        return "stopped", None
    path = keeper.last_lora(unkept, plan.final) if plan.written else None
    if not session.limits.state_every:
        keeper.drop_state()
    return "done", path
