"""What can be known before the first step: refusals before anything is loaded, and the report after."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ..data.buckets import full_buckets, shrink_buckets
from ..data.pairs import PairScan
from ..data.scan import Scan, scan
from ..errors import AdapterError, DataError, JobError, Problem
from ..jsontext import JsonError, read_object
from ..models.base import Model
from ..models.tokenizer import tokenizer_beside
from ..modes.base import MODES
from ..params import core
from ..params.job import Job
from ..paths import exists, expanded, is_file
from ..places import BASE_MODEL, Places
from ..stages.base import Stage
from . import arguments
from .disk import file_room_problems, folder_problems
from .estimate import phase_bytes
from .packages import unserved_problems
from .session import Session

SUFFIXES = (".safetensors", ".ckpt")
DEMO_MODEL = "demo"
MEMORY = "estimated memory (MB)"
"""The name in a run's report of what each phase takes at its peak."""


def resolve_model(name: str, folder: Path, field: str = "model") -> Path:
    """The file or diffusers folder a model name stands for: a path, a name below `folder`, or `demo`.

    Raises JobError when there is none.
    """
    if name == DEMO_MODEL:
        return BASE_MODEL
    given = expanded(name)
    tries = [given, folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]
    for path in tries:
        if name and (is_file(path) or _is_folder_of(path, field)):
            return path
    if field == "vae" and name:
        message = "there is no such VAE file or folder (with config.json) in the VAE folder either. Check the spelling."
        raise JobError([Problem(field, name, message)])
    message = (
        "no model is loaded to be used in its place; give the path of a .safetensors file or of a diffusers folder, "
        "or demo."
        if not name
        else "there is no such file, diffusers folder or model of that name in the model folder. Check the spelling."
    )
    raise JobError([Problem(field, name, message)])


def _is_folder_of(path: Path, field: str) -> bool:
    """Whether a folder is a diffusers model, or for a VAE a diffusers VAE or a model with one."""
    if field == "vae":
        return is_file(path / "config.json") or is_file(path / "vae" / "config.json")
    return is_file(path / "unet" / "config.json")


def resolve_texts(job: Job, folder: Path) -> tuple[Path, ...]:
    """The text encoder files a job names: paths, or names below `folder`. Raises JobError for those there are not."""
    found, problems = [], []
    for name in arguments.text_files(job):
        given = expanded(name)
        tries = (given, folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES))
        path = next((path for path in tries if is_file(path)), None)
        if path is None:
            message = "there is no such text encoder file. Give its path, or leave it empty."
            problems.append(Problem("te", name, message))
        else:
            found.append(path)
    if problems:
        raise JobError(problems)
    return tuple(found)


def lora_path(job: Job, places: Places, suffix: str = "") -> Path:
    """Where the LoRA (or, with a suffix, an intermediate one) of a job is written."""
    return places.loras / f"{job[core.Save].save_lora_name or 'untitled'}{suffix}.safetensors"


Found = Scan | PairScan | None
"""What is known of a run's data before a model is loaded."""


def file_problems(job: Job, places: Places, *, models: bool = False) -> tuple[Problem, ...]:
    """Everything that is wrong with a job and can be known without a model, at its fields; `models` as below."""
    try:
        check_before_loading(job, places, models=models)
    except JobError as error:
        return error.problems
    except DataError as error:
        return (_of_images(job, error),)
    return ()


def check_before_loading(
    job: Job, places: Places, written: Collection[str] = ("",), *, resumed: bool = False, models: bool = False
) -> Found:
    """Refuse what can be refused without a model. Returns what was found of the pictures for modes that use them.

    `written`: the suffixes of the files the run will write; the folders of what it writes are tried. `models`: the base
    model and what is loaded with it are read from files, so they are looked for. Raises JobError with all problems,
    DataError when only the pictures have one.
    """
    problems = [*(_absent_models(job, places) if models else ())]
    save = job[core.Save]
    for target in (lora_path(job, places, suffix) for suffix in written):
        if exists(target) and not save.save_overwrite and not resumed:
            message = f"{target.name} exists already. Choose another name or switch on save_overwrite."
            problems.append(Problem("save_lora_name", save.save_lora_name, message))
    for one in (job, job.second):
        for field in ("train_model_precision", "train_lora_precision", "train_VAE_precision") if one else ():
            try:
                arguments.precision(getattr((one or job)[core.Train], field), field)
            except JobError as error:
                problems.extend(error.problems)
    problems += unserved_problems(job)
    problems += _absent_files(with_lora_files(job, places.loras), resumed)
    if written:
        problems += folder_problems(job, places)
    if written and models and not problems:
        problems += file_room_problems(job, places, resolve_model(job[core.Task].model, places.checkpoints))
    try:
        found = find_data(job)
    except JobError as error:
        problems += error.problems
    except DataError as error:
        if not problems:
            raise
        if not {problem.field for problem in problems} & set(_DATA):  # a file that is absent is named once
            problems.append(_of_images(job, error))
    if problems:
        raise JobError(problems)
    return found


_DATA = ("lora_data_directory", "original image", "target image")
_NAMED = re.compile(r"^lora_data_directory = (['\"]).*?\1:? +")
"""The setting at the beginning of an error of its folder, which stands beside its field anyway."""


def _of_images(job: Job, error: DataError) -> Problem:
    """An error of a job's images at the field that names them."""
    pair = "pictures" in MODES.get(job[core.Task].mode).needs
    field = "target image" if pair else "lora_data_directory"
    given = job[core.Task].target_image if pair else job[core.Images].lora_data_directory
    return Problem(field, given, _NAMED.sub("", str(error)))


def _absent_models(job: Job, places: Places) -> Iterator[Problem]:
    """The base model, VAE and text encoders that a job names and that are not there; prompts that such a model cannot
    take.
    """
    task = job[core.Task]
    attempts: list[Callable[[], object]] = [lambda: resolve_texts(job, places.text_encoders)]
    if task.vae:
        attempts.append(lambda: resolve_model(task.vae, places.vaes, "vae"))
    if MODES.get(task.mode).steps:
        attempts.append(lambda: resolve_model(task.model, places.checkpoints))
    else:  # looks for the model too
        attempts.append(lambda: long_prompts(job, places, None))
    for attempt in attempts:
        try:
            attempt()
        except JobError as error:
            yield from error.problems


def find_data(job: Job) -> Found:
    """The images of a job, for modes that use them. Raises DataError, JobError."""
    source = MODES.get(job[core.Task].mode).passes()[0].source
    if source == "prompts":
        return None
    return scan(arguments.image_settings(job)) if source == "pictures" else arguments.find_pair_data(job)


def too_few_copies(job: Job, found: Found) -> Iterator[str]:
    """A line to warn with: smaller copies of the images that there are no buckets for."""
    wanted = job[core.Images].sub_image_num if arguments.has_epochs(job) else 0
    if found is None or not wanted:
        return
    there = len(shrink_buckets(arguments.image_settings(job)))
    if there < wanted:
        yield (
            f"sub_image_num is {wanted}, but there are {there} smaller buckets: lower image_min_length or"
            " image_buckets_step for more."
        )


def cut_to_one_shape(job: Job, found: Found) -> Iterator[str]:
    """A line to warn with: images that are cut to the only bucket which the default of image_min_length leaves."""
    settings = arguments.image_settings(job)
    short = min(settings.size)
    if found is None or settings.min_length <= short or settings.min_length != core.Images.image_min_length:
        return
    buckets = full_buckets(settings)
    pictures = () if isinstance(found, PairScan) else found.pictures
    other = [one for one in pictures if one.size[0] * buckets[0][1] != one.size[1] * buckets[0][0]]
    if len(buckets) == 1 and other:
        width, height = buckets[0]
        yield (
            f"{len(other)} of {len(pictures)} images have another shape than {width}×{height} and are cut to it:"
            f" image_min_length ({settings.min_length}) leaves no other bucket. Set it to {short} or less for more."
        )


def left_out(found: Found) -> Iterator[str]:
    """Lines to warn with: files of the data folder that are no part of the training."""
    scanned = found.originals if isinstance(found, PairScan) else found
    for line in scanned.left_out if scanned else ():
        yield f"Left out of lora_data_directory: {line}."


LORA_FILES = ("network_resume", "diff_load_1st_pass")


def with_lora_files(job: Job, folder: Path) -> Job:
    """The job with paths in place of the names of LoRAs below `folder`; what is not found stays as it is."""
    named = {name: str(job.value(name)) for name in LORA_FILES}
    found = {name: find_lora(text, folder) for name, text in named.items() if text}
    return job.replace(**{name: str(path) for name, path in found.items() if path is not None})


def find_lora(name: str, folder: Path) -> Path | None:
    """The LoRA file that a text stands for: a path, or a name below `folder` with or without its ending."""
    tries = (arguments.folder(name), folder / name, folder / f"{name}.safetensors")
    return next((path for path in tries if is_file(path)), None)


def _absent_files(job: Job, resumed: bool) -> Iterator[Problem]:
    """Files that the job names, that its mode uses, and that are not there. A resumed run has its LoRA files inside."""
    needs = MODES.get(job[core.Task].mode).needs
    task, lora = job[core.Task], "there is no such file. Give the name of a LoRA, its path, or leave it empty."
    picture = "there is no such file. Give the path of an image."
    named = (
        ("network_resume", job[core.Network].network_resume, "resume", lora),
        ("diff_load_1st_pass", job[core.Pair].diff_load_1st_pass, "first_pass", lora),
        ("original image", task.original_image, "pictures", picture),
        ("target image", task.target_image, "pictures", picture),
    )
    for field, given, tag, message in named:
        if resumed and field in LORA_FILES:
            continue
        if given and tag in needs and not is_file(arguments.folder(given)):
            yield Problem(field, given, message)


MOST_POSITIONS = 100_000
WINDOW = 77
"""Positions of the text encoders of every family; small models have fewer and say so beside their weights."""


def long_prompts(job: Job, places: Places, model: Model | None) -> list[str]:
    """Lines to warn with: prompts that do not fit the text encoder's window, which training reads in parts.

    `model` is the loaded model where there is one; else the vocabulary that its file will be read with is looked up.
    Raises JobError for modes without steps, which take one window.
    """
    mode = MODES.get(job[core.Task].mode).of(job)
    if "prompts" not in mode.needs:
        return []
    if model is None:
        path = resolve_model(job[core.Task].model, places.checkpoints)
        tokenizer, room = tokenizer_beside(path, places.vocabularies), _window(path) - 2
    else:
        tokenizer, room = model.text_encoders[0].tokenizer, model.window - 2
    if tokenizer is None:
        return []
    asked = dict.fromkeys((*arguments.typed_prompts(job), *mode.prompts()))
    suspects = [prompt for prompt in asked if len(prompt.encode()) > room]  # a token has at least one byte
    counts = {prompt: len(tokenizer.encode(prompt)) for prompt in suspects}
    told = {prompt: f"{prompt[:40]!r}… has {count} tokens" for prompt, count in counts.items() if count > room}
    if told and not mode.steps:
        message = f"{next(iter(told.values()))}; mode {job[core.Task].mode} takes at most {room}. Shorten it."
        raise JobError([Problem("original prompt", next(iter(told)), message)])
    return [f"{line}; they are read in parts of {room}, as WebUIs do." for line in told.values()]


def _window(path: Path) -> int:
    config = path / "text_encoder" / "config.json"
    if not is_file(config):
        return WINDOW
    try:
        said = read_object(config).get("max_position_embeddings", WINDOW)
    except JsonError:  # loading will say what is wrong with it
        return WINDOW
    return said if isinstance(said, int) and 2 < said <= MOST_POSITIONS else WINDOW


def _first(session: Session) -> Iterator[str]:
    """What is done before the first step, beside encoding."""
    if not session.mode.steps:
        yield "Solves for every layer; there are no steps."
    elif bank := session.job.value("ileco_bank"):
        yield f"Makes the {bank} states of ileco_bank."
    yield from (stage.help for stage in session.stages if type(stage).prepare is not Stage.prepare)


def report(session: Session, target: Path, cache: Path | None) -> dict[str, object]:
    """What the run will do, name → value; the memory it takes as estimated with the help of `cache`, not without one.

    Raises AdapterError when a chosen part has no module.
    """
    limits, network = session.limits, session.network
    modules = {part: len(adapters) for part, adapters in network.parts().items()}
    if not sum(modules.values()):
        raise AdapterError(
            "No module of the model is trained with these network_blocks, network_element and network_targets. "
            "Select more."
        )
    lines: dict[str, object] = {
        "model": session.model.name,
        "architecture": session.model.family.name,
        "prediction": session.model.process.description,
        "device": str(session.model.device),
        "stored as": arguments.precision_name(session.model.storage),
        "computed in": arguments.precision_name(session.model.compute),
        **session.source.report(),
        "modules": modules,
        "trainable parameters": sum(flat.numel() for flat in session.flat.values),
        "iterations": limits.total_steps,
        "epochs": round(limits.length.epochs, 2),
        "steps per epoch": round(limits.length.steps_per_epoch, 2),
        **({"before the first step": first} if (first := list(_first(session))) else {}),
        "gradient norm limit": limits.max_grad_norm or "none",
        "processes": session.process.count,
        "seed": session.seed,
        "writes": target.name,
    }
    if cache is None:
        return lines
    found = phase_bytes(session, cache)
    return {**lines, MEMORY: {name: round(size / 2**20) for name, size in found.items()}}
