"""From what was typed to a request: settings files, presets, overrides, run folders.

The engine and its libraries take many seconds to import; what is wrong with the settings is found before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import JobError, Problem
from ..events import EventLog
from ..params.catalogue import Catalogue
from ..params.cli import add_flags, apply_overrides, collect_flags, lay_over, unknown_flag_hint
from ..params.codec import beside, load, load_rest
from ..params.files import read_json
from ..params.job import NOTE
from ..params.presets import Presets, brought
from ..paths import expanded, is_file
from ..places import ROOT, Places

if TYPE_CHECKING:
    from ..engine.run import Request


def catalogue() -> Catalogue:
    """The table of parameters."""
    from ..engine.catalogue import catalogue

    return catalogue()


def presets() -> Presets:
    """The shipped presets and the user's own."""
    return Presets(ROOT / "presets")


def raw_job(name: str) -> dict[str, object]:
    """The plain values of a settings file, or of the preset of that name. Raises JobError when it is neither."""
    path = Path(name)
    if is_file(path):
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise JobError([Problem("job", name, "must hold a JSON object, as written by save_as_json.")])
        return raw
    shelf = presets()
    if name in shelf.names():
        return {**shelf.load(name, catalogue()).job.to_dict(), **brought(name)}
    known = ", ".join(shelf.names())
    raise JobError([Problem("job", name, f"is neither a file nor a preset. Presets: {known}.")])


def flags_of(words: Sequence[str]) -> dict[str, object]:
    """The parameters given as flags (`--network-rank 8`), one flag for each row of the table."""
    parser = argparse.ArgumentParser(prog="trainer train", add_help=False)
    add_flags(parser, catalogue())
    options, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise JobError([Problem("command line", " ".join(unknown), unknown_flag_hint(unknown, catalogue()))])
    return collect_flags(options)


@dataclass(frozen=True)
class Given:
    """What was typed besides the job: `--set` pairs and flags of single parameters."""

    overrides: Sequence[str] = ()
    flags: Sequence[str] = ()


def request(name: str, given: Given, places: Places, *, resume: bool, dry: bool, log: EventLog) -> Request:
    """What to run. With `resume`, `name` is a run folder; its own job is taken, with those settings laid over it that a
    run that goes on may change.
    """
    overrides, flags = given.overrides, flags_of(given.flags) if given.flags else {}
    if resume:
        from ..engine.resume import amended, read_job
        from ..engine.run import Request

        folder = expanded(name)
        before = read_job(folder)
        laid = lay_over(apply_overrides(before.to_dict(full=True), overrides, catalogue()), flags, catalogue())
        job = amended(before, laid) if overrides or flags else before
        return Request(job, places, resume=folder, dry=dry)
    raw = lay_over(apply_overrides(raw_job(name), overrides, catalogue()), flags, catalogue())
    try:
        loaded = load(raw, catalogue())
    except JobError as error:
        raise JobError([*error.problems, *_of_files(raw, error, places)]) from None
    for line in loaded.warnings:
        log.warn(line)
    log.note("Starting.")
    from ..engine.run import Request

    return Request(loaded.job, places, dry=dry)


def _of_files(raw: Mapping[str, object], error: JobError, places: Places) -> tuple[Problem, ...]:
    """What is wrong with the files of settings that have other problems too."""
    rest = load_rest(raw, error.problems, catalogue())
    if rest is None:
        return ()
    from ..engine.preflight import file_problems

    return beside(file_problems(rest, places, models=True), error.problems)


def preset_text(name: str | None) -> str:
    """The list of presets with the notes they carry, or one as JSON."""
    shelf = presets()
    if name is None:
        return "\n".join(f"{known:24} {note}".rstrip() for known in shelf.names() for note in [_note(shelf, known)])
    note, job = shelf.note(name), shelf.load(name, catalogue()).job
    return json.dumps({**({NOTE: note} if note else {}), **job.to_dict()}, indent=2, ensure_ascii=False)


def _note(shelf: Presets, name: str) -> str:
    try:
        return shelf.note(name)
    except JobError:  # a damaged file is named when it is chosen
        return ""
