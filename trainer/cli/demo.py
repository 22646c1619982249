"""`demo`: teach the shipped base model a new word from a dozen shipped pictures, and measure what happened."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..demo.effect import demo_grid, measure_effect
from ..engine.arguments import precision
from ..engine.catalogue import catalogue
from ..engine.control import Control
from ..engine.preflight import resolve_model
from ..engine.reload import written_network
from ..engine.run import Request, run
from ..events import EventLog
from ..models.load import load_model
from ..params import core
from ..params.cli import apply_overrides
from ..params.codec import load
from ..params.job import Job
from ..places import Places
from .jobs import raw_job
from .terminal import Terminal


def demo(places: Places, overrides: Sequence[str], control: Control) -> int:
    """Train, sample before and after with the written file, and print one line of JSON. Returns the exit status."""
    job = load(apply_overrides(raw_job("demo"), overrides, catalogue()), catalogue()).job
    terminal = Terminal()
    log = EventLog(terminal)
    started = time.perf_counter()
    result = run(Request(job, places), log, control)
    trained = time.perf_counter() - started
    if result.path is None or result.folder is None:
        return 130
    log.note("Sampling 600 images with and without the LoRA.")
    effect, picture = _after(job, places, result.path, result.folder, log)
    print(f"LoRA:    {result.path}")
    print(f"Image:   {picture}")
    print(f"Log:     {result.folder / (job[core.Save].save_lora_name + '.csv')}")
    seconds = {"training": round(trained, 1), "whole": round(time.perf_counter() - started, 1)}
    print(json.dumps({**effect, "steps": job[core.Train].train_iterations, "seconds": seconds}))
    sys.stdout.flush()
    return 0


def _after(job: Job, places: Places, lora: Path, folder: Path, log: EventLog) -> tuple[dict[str, object], Path]:
    """Load the written file onto a fresh model, as a user would, and measure it."""
    path = resolve_model(job[core.Task].model, places.checkpoints)
    model = load_model(path, storage=precision("fp32", "train_model_precision"))
    with written_network(job, model, lora, log).attached() as network:
        return measure_effect(model, network).as_dict(), demo_grid(model, network, folder / "before_after.png")
