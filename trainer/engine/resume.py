"""What a run that goes on may change, and whether it still is the same run: settings, base model, data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import JobError, Problem, TrainingError, brief
from ..models.base import Model
from ..params import core
from ..params.cli import lay_over
from ..params.codec import load
from ..params.files import read_json
from ..params.job import SECOND_PASS, Job
from ..paths import is_file
from .catalogue import catalogue
from .devices import fingerprint
from .folder import JOB_FILE, open_folder

LENGTH = frozenset({"train_iterations", "train_epochs"})
_FREE_SECTIONS = (core.Save, core.Export, core.Log, core.Sample)
_FREE = LENGTH | {"train_state_every", "data_cache"}
_MOVED = frozenset(
    {
        "model",
        "vae",
        "te",
        "lora_data_directory",
        "original_image",
        "target_image",
        "basis_path",
        "svd_cache_path",
    }
)
"""Settings that say where something is. What is there is compared by its contents, or lies in the state already."""

_SINCE, _TEXT_RATE = "model_zero_terminal_snr", "train_textencoder_learning_rate"

Weights = dict[str, list[str]]
"""Part of the base model → how it is stored, fingerprint of its weights."""


def read_job(folder: Path) -> Job:
    """The job a run folder was started with; what it needed to begin may be gone. Raises TrainingError when it is not
    a run folder, JobError when its job is damaged.
    """
    path = folder / JOB_FILE
    if not is_file(path):
        raise TrainingError(f"{folder} is not a run folder: it has no {JOB_FILE}. Run folders are below logs/<date>/.")
    return load(_as_meant(read_json(path)), catalogue(), complete=False).job


def _as_meant(raw: Any) -> Any:
    """The settings of a run folder as the version meant them that wrote it: one without _SINCE, which it would have
    written with all the others, took a learning rate of 0 for the text encoder as empty.
    """
    return raw if not isinstance(raw, dict) or _SINCE in raw else _rate_emptied(raw)


def _rate_emptied(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return raw
    kept = {key: value for key, value in raw.items() if key != _TEXT_RATE or value != 0}
    return {**kept, SECOND_PASS: _rate_emptied(kept[SECOND_PASS])} if SECOND_PASS in kept else kept


def may_change(attribute: str, section: type) -> bool:
    """Whether a run that goes on may have another value of a setting than the one it began with."""
    return section in _FREE_SECTIONS or attribute in _FREE or attribute in _MOVED


def check_settings(before: Job, now: Job) -> None:
    """Raise JobError with every setting that differs and has to stay."""
    problems = [*_differences(before, now, ""), *_other_second(before, now)]
    length = {name for name in LENGTH if before.value(name) != now.value(name)}
    if length == {"train_iterations"} and now[core.Train].train_epochs:
        message = f"train_epochs = {now[core.Train].train_epochs} says how long this run is. Change train_epochs."
        problems.append(Problem("train_iterations", now[core.Train].train_iterations, message))
    if problems:
        raise JobError(problems)


def _differences(before: Job, now: Job, prefix: str) -> Iterator[Problem]:
    for parameter in catalogue().parameters:
        old, new = before.value(parameter.attribute), now.value(parameter.attribute)
        if old != new and not may_change(parameter.attribute, parameter.section):
            message = f"was {brief(old)} when this run began and has to stay. Put it back, or start a new job."
            yield Problem(prefix + parameter.key, new, message)


def _other_second(before: Job, now: Job) -> Iterator[Problem]:
    if before.second is not None and now.second is not None:
        yield from _differences(before.second, now.second, f"{SECOND_PASS}.")


def amended(before: Job, raw: Mapping[str, object]) -> Job:
    """The job of a run that goes on with other settings, of those it may change. Raises JobError for all others."""
    job = load(raw, catalogue(), complete=False).job
    check_settings(before, job)
    return job


def amend(folder: Path, values: Mapping[str, object]) -> Job:
    """Lay these settings over the job in a run folder, for when the run goes on; the job comes back.

    Raises JobError for those that have to stay, TrainingError when the run is going on now.
    """
    before = read_job(folder)
    job = amended(before, lay_over(before.to_dict(full=True), values, catalogue()))
    held = open_folder(folder)
    try:
        held.keep_job(job)
    finally:
        held.close()
    return job


def check_state_job(facts: Mapping[str, Any], job: Job) -> None:
    """Compare the job of a run that goes on with the one its state was written under. Raises JobError."""
    if "job" in facts:
        check_settings(load(facts["job"], catalogue(), complete=False).job, job)


def weights_of(model: Model) -> Weights:
    """What a state says of the weights that its adapter was trained on."""
    parts = {"unet": model.unet, "vae": model.vae}
    parts |= {f"te{number + 1}": encoder for number, encoder in enumerate(model.text_encoders)}
    return {
        name: [str(next(part.parameters()).dtype).removeprefix("torch."), fingerprint(part)]
        for name, part in parts.items() if part is not None
    }  # fmt: skip


def check_weights(facts: Mapping[str, Any], weights: Weights, model: str, parts: Collection[str]) -> None:
    """Raise TrainingError when one of these parts of the base has other weights than its state was written with."""
    before = facts.get("weights", {})
    stored = [name for name in parts if name in before and before[name][0] != weights.get(name, [""])[0]]
    other = [name for name in parts if name in before and before[name] != weights.get(name) and name not in stored]
    if stored:
        told = ", ".join(f"{name} as {before[name][0]}, now {weights.get(name, ['absent'])[0]}" for name in stored)
        raise TrainingError(
            f"The base model is stored in another precision than when this run was stopped: {told}. Load it as before, "
            "or start the job again."
        )
    if other:
        raise TrainingError(
            f"The base model has other weights than when this run was stopped: {', '.join(sorted(other))} of {model} "
            f"(then {facts.get('model', 'unknown')}). Restore the model it was started with, or start the job again."
        )
