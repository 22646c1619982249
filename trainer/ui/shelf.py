"""What lies ready to be taken: presets, settings files, finished LoRAs' settings, logs; and the folders themselves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from ..adapters.metadata import JOB_KEY
from ..errors import AtelierError, JobError, Problem
from ..jobs.live import Facts
from ..jsontext import JsonError, parse
from ..params.catalogue import Catalogue
from ..params.codec import Loaded, load
from ..params.core import Save, Task
from ..params.files import json_bytes, read_json
from ..params.presets import Presets, brought
from ..places import Places
from ..writing import why, write_new
from .fence import NotServedError, inside, served

MOST_LISTED = 200
OPENING = 3.0
"""Seconds in which an opener that cannot open a folder says so."""

CSV, JSON = frozenset({".csv"}), frozenset({".json"})
IMAGES = "images"
"""Folder below the logs for what the picture tools write, and for pictures that were dropped on the page."""

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
OURS = frozenset({"queue", "cache"})
"""Folders among the logs that hold no runs."""


class Shelf:
    """Named things in the folders of the host. Names never hold a path; `/` in them parts folders of ours."""

    def __init__(self, catalogue: Catalogue, places: Callable[[], Places]) -> None:
        self._catalogue, self._places = catalogue, places

    # ---------------------------------------------------------------- presets

    def presets(self) -> dict[str, list[str]]:
        """Names: `shipped` (read-only) and `own`."""
        shelf = self._presets()
        return {"shipped": list(shelf.shipped()), "own": list(shelf.own())}

    def preset(self, name: str) -> dict[str, object]:
        """`settings` (every value), `warnings` and `note` of a preset; the demo's brings its model and pictures. Raises
        JobError.
        """
        raw, note = self._presets().read(name), self._presets().note(name)
        if isinstance(raw, Mapping):
            raw = {**raw, **brought(name)}
        return {**_filled(load(raw, self._catalogue, complete=False)), "note": note}

    def preset_of_mode(self, mode: str) -> dict[str, object]:
        """`name` and `settings` of the preset that holds a mode's own values; no name when none does. Raises
        JobError.
        """
        name = self._presets().of_mode(mode)
        if not name:
            return {"name": "", "settings": {}}
        found = load(self._presets().read(name), self._catalogue, complete=False).job.to_dict(full=True)
        return {"name": name, "settings": {**found, "mode": mode}}

    def save_preset(self, name: str, raw: Mapping[str, object]) -> dict[str, list[str]]:
        """Keep settings as the user's preset `name`; they may leave open what a run needs. The names come back. Raises
        JobError.
        """
        self._presets().save(name, load(raw, self._catalogue, complete=False).job)
        return self.presets()

    def delete_preset(self, name: str) -> dict[str, list[str]]:
        """Delete a preset of the user's; the names come back. Raises JobError."""
        self._presets().delete(name)
        return self.presets()

    def _presets(self) -> Presets:
        return Presets(self._places().presets)

    # ---------------------------------------------------------------- settings

    def files(self) -> list[str]:
        """Names of the settings files written by runs, the latest first."""
        return _latest(self._places().json, ".json")

    def file(self, name: str) -> dict[str, object]:
        """`settings` and `warnings` of one of these. Raises JobError, NotServedError."""
        return _filled(load(read_json(served(self._places().json, name, JSON)), self._catalogue, complete=False))

    def save_file(self, raw: Mapping[str, object]) -> dict[str, object]:
        """Write settings, which may leave open what a run needs, to a file of their own; its `name` comes back. Raises
        JobError, AtelierError.
        """
        job = load(raw, self._catalogue, complete=False).job
        now, folder = datetime.now(), self._places().json
        stem = f"{now:%Y-%m-%d}/{now:%H%M%S}-{job[Save].save_lora_name or job[Task].mode}"
        try:
            path = write_new(folder / f"{stem}.json", json_bytes(job.to_dict(full=True)), reuse=False)
        except OSError as fault:
            raise AtelierError(f"The settings cannot be written to {folder}: {why(fault)}.") from fault
        return {"name": path.relative_to(folder).as_posix()}

    def read(self, text: str) -> dict[str, object]:
        """`settings` and `warnings` of a text: a settings file, or the header of a LoRA of ours, whose metadata holds
        its job. Raises JobError.
        """
        raw = _parsed(text, "Choose a settings file or a LoRA.")
        metadata = raw.get("__metadata__") if isinstance(raw, Mapping) else None
        if metadata is None:
            return _filled(load(raw, self._catalogue, complete=False))
        held = metadata.get(JOB_KEY) if isinstance(metadata, Mapping) else None
        if not isinstance(held, str):
            message = "carries no settings: it was made by another program, or with save_metadata minimal or none."
            raise JobError([Problem("file", "LoRA", message)])
        settings = _parsed(held, "The settings in this LoRA are damaged; choose another file.")
        found = _filled(load(settings, self._catalogue, complete=False))
        note = "A LoRA names folders and files without their path; give the data folder and the model again."
        return {**found, "warnings": [note, *_list(found["warnings"])]}

    # ---------------------------------------------------------------- LoRAs and logs

    def loras(self) -> list[str]:
        """Names of the LoRA files, `/` between folders, the latest first."""
        return _latest(self._places().loras, ".safetensors")

    def logs(self) -> list[str]:
        """Names of the CSV logs below the logs folder, the latest first."""
        return _latest(self._places().logs, ".csv")

    def log(self, name: str) -> Path:
        """The file of a log; an empty name is the latest. Raises NotServedError."""
        name = name or next(iter(self.logs()), "")
        if not name:
            raise NotServedError("There is no log yet. Switch on logging_save_csv and train.")
        return served(self._places().logs, name, CSV)

    def picture(self, name: str) -> Path:
        """The file of a picture below the logs folder. Raises NotServedError."""
        return served(self._places().logs, name, PICTURES)

    # ---------------------------------------------------------------- folders

    def open_folder(self, which: str, facts: Facts | None, show: Callable[[Path], None] | None = None) -> str:
        """Show a folder in the file manager; its name comes back. Raises AtelierError."""
        places = self._places()
        known = {"loras": places.loras, "logs": places.logs, "json": places.json, "presets": places.presets}
        known["images"] = places.logs / IMAGES
        if which == "run":
            if facts is None or not facts.folder:
                raise AtelierError("There is no run folder yet.")
            known["run"] = Path(facts.folder)
        if which not in known:
            raise AtelierError(f"{which[:80]!r} is no folder of ours. Known: {', '.join([*known, 'run'])}.")
        folder = known[which]
        folder.mkdir(parents=True, exist_ok=True)
        (show or _show)(folder)
        return folder.name


def _filled(loaded: Loaded) -> dict[str, object]:
    return {"settings": loaded.job.to_dict(full=True), "warnings": list(loaded.warnings)}


def _parsed(text: str, advice: str) -> object:
    """What a JSON text from a request holds. Raises JobError."""
    try:
        return parse(text)
    except JsonError as fault:
        raise JobError([Problem("file", text[:40], f"{fault}. {advice}")]) from fault


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def _latest(folder: Path, suffix: str) -> list[str]:
    """Names below a folder of dated folders, the latest first."""
    found: list[tuple[float, str]] = []
    for path in folder.rglob(f"*{suffix}"):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith(".") or name.split("/")[0] in OURS or name.startswith("queue-"):
            continue
        with contextlib.suppress(OSError):  # deleted meanwhile
            changed = path.stat().st_mtime
            if inside(path, folder):
                found.append((changed, name))
    return [name for _, name in sorted(found, reverse=True)[:MOST_LISTED]]


def _show(folder: Path) -> None:
    """Open the file manager of this machine. Raises AtelierError, which says where the folder is, when none opens."""
    try:
        if os.name == "nt":
            os.startfile(folder)  # type: ignore[attr-defined,unused-ignore]
            return
        program = "open" if sys.platform == "darwin" else "xdg-open"
        quiet = subprocess.DEVNULL
        opener = subprocess.Popen([program, str(folder)], stdin=quiet, stdout=quiet, stderr=quiet)
        failed = opener.wait(OPENING) != 0
    except subprocess.TimeoutExpired:
        return  # a file manager that is itself what was started
    except OSError:
        failed = True
    if failed:
        raise AtelierError(f"No file manager opens on this machine. The folder is {folder.resolve()}.")
