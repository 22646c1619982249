"""What ordinary pictures depend on in a base model: the context file of LaLoRA, from pictures or the model's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..adapters.file import checked_name, name_note, write_lora
from ..data.cache import TensorCache
from ..engine.build import Site, build
from ..engine.catalogue import catalogue
from ..engine.flags import training_flags
from ..engine.passes import plan_passes
from ..engine.preflight import check_before_loading
from ..engine.process import this_process
from ..engine.run import load_base
from ..engine.session import Session
from ..engine.shortage import PREPARING, phase
from ..errors import AdapterError
from ..events import EventLog, Note
from ..models.base import Model
from ..params.codec import load
from ..params.job import Job
from ..places import Places
from ..stages.base import Preparation
from ..stages.lalora import COLUMNS, MARK, ROWS, STATES, VERSION, measure
from ..stages.trajectories import GENERIC, State, trajectories


@dataclass(frozen=True)
class CurvatureReport:
    """The file, how many states and layers it holds, and how long it took (seconds)."""

    path: Path
    states: int
    layers: int
    seconds: float


def curvature_job(settings: Mapping[str, object], pictures: str = "", prompts: str = "") -> Job:
    """The job that loads model and data for the measurement; `settings` are parameters of the training it is for.

    With `pictures` (a folder) the states are those pictures, noised; without, the model draws the prompts (one per
    line; generic ones when empty). Raises JobError.
    """
    own = "\n".join(GENERIC)
    asked = {"mode": "LoRA", "lora_data_directory": pictures} if pictures else {
        "mode": "iLECO", "original prompt": prompts or own, "target prompt": prompts or own, "ileco_anchor_weight": 0,
        "network_train_text_encoder": True,
    }  # fmt: skip
    fixed = {"format": 1, "network_type": "c3lier", "network_rank": 1, "train_batch_size": 1, "save_lora_name": ""}
    return load({**fixed, "train_seed": 0, **settings, **asked}, catalogue()).job


def make_curvature(
    job: Job,
    places: Places,
    out: Path,
    count: int = 64,
    by_data: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    model: Model | None = None,
) -> CurvatureReport:
    """Measure `count` states for all layers a job could train, and write the file. Raises AtelierError."""
    out = checked_name(out, "--out")
    if count < 1:
        raise AdapterError(f"--states = {count}: at least 1 state has to be measured.")
    started = time.perf_counter()
    log = EventLog(lambda event: tell(event.text) if isinstance(event, Note) else None)
    process = this_process()
    found_data = check_before_loading(job, places, ())
    site = Site(places, process, log, places.logs, TensorCache(None))
    plan = plan_passes(job)[0]
    session = build(plan, model or load_base(job, places, process, log), site, found_data, prepared=False)
    try:
        pictured = session.mode.source == "pictures"
        if by_data and not pictured:
            raise AdapterError("Labels from data need images: give a folder of them, or take the model's labels.")
        loss = partial(session.mode.loss, session.kit)
        at = Preparation(session.network, session.model, session.kit, session.source.batch, tell, session.seed, loss)
        states = _pictures(session, count) if pictured else _drawings(at, session, count)
        with training_flags(session.model.device), phase(PREPARING, session.model.device, session.job):
            found = measure(at, states, {adapter.key: adapter.module for adapter in session.network}, by_data)
    finally:
        session.network.eject()
    if not found:
        raise AdapterError("Nothing was measured: the data had no state to look at.")
    tensors = {f"{key}.{ROWS}": rows for key, (rows, _) in found.items()}
    tensors |= {f"{key}.{COLUMNS}": columns for key, (_, columns) in found.items()}
    labels = "data" if by_data else "model"
    facts = {MARK: VERSION, "model": session.model.name, "states": str(count), "labels": labels}
    path = write_lora(out, tensors, {**facts, "prediction": session.model.process.prediction})
    if path != out:
        tell(name_note(out, path))
    return CurvatureReport(path, count, len(found), time.perf_counter() - started)


def _drawings(at: Preparation, session: Session, count: int) -> Iterator[State]:
    """Up to `count` states of drawings of the job's prompts, each prompt's in turn."""
    prompts = tuple(dict.fromkeys(session.source.prompts()))
    whole = prompts * (-(-count // (STATES * len(prompts))))
    for number, state in enumerate(trajectories(at, whole, STATES, "curvature")):
        if number == count:
            return
        yield state


def _pictures(session: Session, count: int) -> Iterator[State]:
    """`count` states of the job's pictures at timesteps of its range, with the right prediction."""
    kit, done, index = session.kit, 0, 0
    while done < count:
        batch = session.source.batch(index)
        index += 1
        if batch is None:
            continue
        latents, noise, t = kit.latents(batch), kit.noise(batch), kit.timesteps(batch)
        x, target = kit.process.add_noise(latents, noise, t), kit.process.target(latents, noise, t)
        for row in range(min(len(x), count - done)):
            ids = None if batch.time_ids is None else batch.time_ids[row : row + 1]
            yield State(x[row : row + 1], t[row : row + 1], batch.prompts[row], ids, target[row : row + 1])
            done += 1
