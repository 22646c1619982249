"""Presets: settings under a name. The shipped ones are read-only, the user's own are kept in a folder beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import JobError, Problem
from ..paths import is_file
from ..places import BASE_PICTURES
from ..writing import why
from .catalogue import Catalogue
from .codec import Loaded, load
from .files import name_problem, read_json, write_json
from .job import NOTE, Job

USER = "user"
DEMO = "demo"


def brought(name: str) -> Mapping[str, object]:
    """What a preset brings along besides its settings: the demo's trains the model of this repository on its pictures,
    as often as somebody likes.
    """
    demo = {"model": DEMO, "lora_data_directory": str(BASE_PICTURES), "save_overwrite": True}
    return demo if name == DEMO else {}


class Presets:
    """The presets of a folder: shipped in it, the user's own in its sub-folder `user`."""

    def __init__(self, folder: Path, user: Path | None = None) -> None:
        self._shipped = folder
        self._user = user if user is not None else folder / USER

    def shipped(self) -> tuple[str, ...]:
        """Names of the read-only presets, sorted."""
        return _names(self._shipped)

    def own(self) -> tuple[str, ...]:
        """Names of the user's presets, sorted."""
        return _names(self._user)

    def names(self) -> tuple[str, ...]:
        """All names, the shipped ones first."""
        shipped = self.shipped()
        return (*shipped, *(name for name in self.own() if name not in shipped))

    def load(self, name: str, catalogue: Catalogue) -> Loaded:
        """The preset `name`; it may leave open what a run needs. Raises JobError, also when there is no such preset."""
        return load(self.read(name), catalogue, complete=False)

    def read(self, name: str) -> object:
        """The plain values of the preset `name`. Raises JobError when there is no such preset or it cannot be read."""
        path = self._find(name)
        if path is None:
            known = ", ".join(self.names()) or "none"
            raise JobError([Problem("preset", name, f"is not there. Known: {known}.")])
        return read_json(path)

    def note(self, name: str) -> str:
        """The sentence a preset carries about itself, "" for none. Raises JobError as `read` does."""
        raw = self.read(name)
        found = raw.get(NOTE) if isinstance(raw, dict) else None
        return found if isinstance(found, str) else ""

    def of_mode(self, mode: str) -> str:
        """The shipped preset that holds a mode's own values, "" when none does: that of its name, else the first whose
        name begins with it; Multi-ADDifT has those of ADDifT.
        """
        shipped, plain = self.shipped(), mode.removeprefix("Multi-")
        begins = (name for name in shipped if name.startswith(f"{plain}_"))
        return plain if plain in shipped else next(begins, "")

    def save(self, name: str, job: Job) -> Path:
        """Write a user preset with every value, in place of one of the same name. Raises JobError for an unfit name."""
        self._refuse_name(name)
        path = _find(self._user, name) or self._user / f"{name}.json"
        try:
            write_json(path, job.to_dict(full=True))
        except OSError as fault:
            message = f"cannot be written to {path.parent}: {why(fault)}."
            raise JobError([Problem("preset", name, message)]) from fault
        return path

    def delete(self, name: str) -> None:
        """Delete a user preset. Raises JobError when it is a shipped one or there is none of that name."""
        self._refuse_name(name)
        path = _find(self._user, name)
        if path is None:
            raise JobError([Problem("preset", name, f"is not there. Yours: {', '.join(self.own()) or 'none'}.")])
        try:
            path.unlink()
        except OSError as fault:
            raise JobError([Problem("preset", name, f"cannot be deleted: {why(fault)}.")]) from fault

    def _find(self, name: str) -> Path | None:
        return None if name_problem(name) else _find(self._shipped, name) or _find(self._user, name)

    def _refuse_name(self, name: str) -> None:
        fault = name_problem(name)
        if not fault and _find(self._shipped, name) is not None:
            fault = "is a shipped preset, which stays as it is; choose another name."
        if fault:
            raise JobError([Problem("preset", name, fault)])


def _names(folder: Path) -> tuple[str, ...]:
    found = [path.stem for path in folder.glob("*.json") if path.is_file() and not path.name.startswith(".")]
    return tuple(sorted(found, key=str.lower))


def _find(folder: Path, name: str) -> Path | None:
    """The file of a name, ignoring case as Windows does."""
    exact = folder / f"{name}.json"
    if is_file(exact):
        return exact
    same = [folder / f"{held}.json" for held in _names(folder) if held.lower() == name.lower()]
    return same[0] if same else None
