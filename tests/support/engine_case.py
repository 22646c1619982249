"""A small complete job: a tiny random SD1 model in a diffusers folder, six pictures of the painted world, captions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tiny

from trainer.data.cache import TensorCache
from trainer.demo import world
from trainer.engine.build import build
from trainer.engine.catalogue import catalogue
from trainer.engine.control import Control
from trainer.engine.csvlog import read_losses
from trainer.engine.passes import plan_passes
from trainer.engine.preflight import check_before_loading
from trainer.engine.process import Process
from trainer.engine.run import Request, Result, run
from trainer.engine.session import Session
from trainer.engine.site import Site
from trainer.events import Event, EventLog, Step
from trainer.models.base import Model
from trainer.params.codec import load
from trainer.params.job import Job
from trainer.places import Places

SETTINGS: dict[str, object] = {
    "format": 1,
    "mode": "LoRA",
    "network_rank": 4,
    "network_alpha": 2,
    "image_size(height, width)": 64,
    "image_min_length": 64,
    "image_buckets_step": 64,
    "train_iterations": 12,
    "train_batch_size": 2,
    "train_learning_rate": 1e-3,
    "train_model_precision": "fp32",
    "train_seed": 3,
    "train_state_every": 0,
    "save_precision": "fp32",
    "save_lora_name": "case",
    "logging_save_csv": True,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Folders of one test: the model, the pictures, and everything that is written."""

    root: Path
    model: Path
    pictures: Path

    @property
    def places(self) -> Places:
        return Places.standalone(self.root / "models").under(self.root / "out")

    def settings(self, **changes: object) -> dict[str, object]:
        return {**SETTINGS, "model": str(self.model), "lora_data_directory": str(self.pictures), **changes}

    def job(self, **changes: object) -> Job:
        return load(self.settings(**changes), catalogue()).job

    def job_file(self, **changes: object) -> Path:
        path = self.root / "job.json"
        path.write_text(json.dumps(self.settings(**changes)), encoding="utf-8")
        return path

    def run(self, *listeners, control=None, resume: Path | None = None, dry: bool = False, **changes: object) -> Result:
        request = Request(self.job(**changes), self.places, resume=resume, dry=dry)
        return run(request, EventLog(*listeners), control)


def make(root: Path, kind: str = "sd1") -> Case:
    """Write model and pictures below `root`."""
    model, pictures = root / "base", root / "pictures"
    tiny.folder(kind, model)
    scenes = world.draw_scenes(6, np.random.default_rng(5), "base")
    world.write_folder(pictures, scenes, seed=5)
    return Case(root, model, pictures)


def session(case: Case, job: Job, model: Model) -> Session:
    """A session of a job with one pass, ready for its first step and with nothing written; eject its network."""
    site = Site(case.places, Process(), EventLog(), case.root / "run", TensorCache(None))
    (plan,) = plan_passes(job)
    return build(plan, model, site, check_before_loading(job, case.places))


class Trace:
    """A listener that keeps the events, with the losses at hand."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, Step)}


def csv_losses(folder: Path) -> dict[int, float]:
    """The losses in the CSV log of a run folder, by step."""
    (path,) = folder.glob("*.csv")
    return dict(read_losses(path))


def stopped_and_resumed(case: Case, name: str, **changes: object) -> tuple[dict[int, float], dict[int, float]]:
    """(losses of a run stopped after step 5 and resumed, losses of the same run left alone), nine steps each."""
    changes = {"train_iterations": 9, "train_state_every": 5, "save_overwrite": True, "data_cache": "memory", **changes}
    whole, parts, control = Trace(), Trace(), Control()
    case.run(whole, save_lora_name=f"{name}-whole", **changes)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            control.stop()

    stopped = case.run(parts, stop, control=control, save_lora_name=f"{name}-parts", **changes)
    assert stopped.reason == "stopped" and max(parts.losses) == 5
    result = case.run(parts, resume=stopped.folder, save_lora_name=f"{name}-parts", **changes)
    assert result.reason == "done" and result.folder == stopped.folder
    assert csv_losses(stopped.folder) == parts.losses
    return parts.losses, whole.losses
