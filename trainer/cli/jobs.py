"""From what was typed to a request: settings files, presets, overrides, run folders."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..engine.catalogue import catalogue
from ..engine.run import Request, read_job
from ..errors import JobError, Problem
from ..events import EventLog
from ..params.cli import apply_overrides
from ..params.codec import load
from ..params.files import read_json
from ..params.presets import Presets
from ..places import ROOT, Places


def presets() -> Presets:
    """The shipped presets and the user's own."""
    return Presets(ROOT / "presets")


def raw_job(name: str) -> object:
    """The plain values of a settings file, or of the preset of that name."""
    path = Path(name)
    if path.is_file():
        return read_json(path)
    shelf = presets()
    if name in shelf.names():
        return shelf.read(name)
    known = ", ".join(shelf.names())
    raise JobError([Problem("job", name, f"is neither a file nor a preset. Presets: {known}.")])


def request(name: str, overrides: Sequence[str], places: Places, *, resume: bool, dry: bool, log: EventLog) -> Request:
    """What to run. With `resume`, `name` is a run folder and its own job is taken as it is."""
    if resume:
        if overrides:
            raise JobError([Problem("--set", list(overrides), "a resumed run keeps its settings. Leave --set away.")])
        folder = Path(name)
        return Request(read_job(folder), places, resume=folder, dry=dry)
    raw = raw_job(name)
    if isinstance(raw, dict):
        raw = apply_overrides(raw, overrides)
    loaded = load(raw, catalogue())
    for line in loaded.warnings:
        log.warn(line)
    return Request(loaded.job, places, dry=dry)


def preset_text(name: str | None) -> str:
    """The list of presets, or one as JSON."""
    shelf = presets()
    if name is None:
        return "\n".join(shelf.names())
    return json.dumps(shelf.read(name), indent=2, ensure_ascii=False)
