"""Which files a request may name. What is served or written stays in configured folders; what a job reads may lie
anywhere while only this machine can ask, and below few folders when others can.
"""

from __future__ import annotations

import ntpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import AtelierError, Problem
from ..params.catalogue import Catalogue
from ..params.job import SECOND_PASS
from ..paths import exists, expanded, is_file
from ..places import BASE_MODEL, BASE_PICTURES, Places

READS = frozenset({"folder", "picture", "lora", "model", "vae", "te", "file"})
"""Kinds of texts (`Spec.holds`) that name something a run reads."""

SUFFIXES = (".safetensors", ".ckpt")
DEMO = "demo"

Listed = Callable[[str], tuple[str, ...]]

_NETWORK = re.compile(r"^[\\/]{2}")


class NotServedError(AtelierError):
    """A file that is not there, or not for this caller; the two are not told apart."""


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, is `folder` or below it."""
    try:
        path.resolve().relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):
        return False
    return True


def served(folder: Path, name: str, suffixes: frozenset[str]) -> Path:
    """The existing file `name` (with `/` between its parts) below `folder`. Raises NotServedError for anything else:
    ways up, absolute and network paths, drives, streams, links that lead out, other kinds of files.
    """
    refused = NotServedError(f"{name[:200]!r} is not there.")
    parts = name.split("/")
    if any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
        raise refused
    path = folder.joinpath(*parts)
    if path.suffix.lower() not in suffixes or not inside(path, folder) or not is_file(path):
        raise refused
    return path


class Fence:
    """What the settings of a job may name. `open` is true while only this machine can reach the program; `listed` are
    the names a host offers for a kind (model, vae, te), which may always be chosen.
    """

    def __init__(self, places: Places, data_root: Path | None, open: bool, listed: Listed) -> None:
        self._open, self._data_root, self._listed = open, data_root, listed
        models = {"model": places.checkpoints, "vae": places.vaes, "lora": places.loras}
        shipped = {"model": BASE_MODEL, "folder": BASE_PICTURES, "picture": BASE_PICTURES}
        self._folders: Mapping[str, Path] = models
        self._roots: dict[str, list[Path]] = {kind: [] if data_root is None else [data_root] for kind in READS}
        for kind, folder in [*models.items(), *shipped.items()]:
            self._roots[kind].append(folder)

    def problems(self, raw: Mapping[str, object], catalogue: Catalogue) -> Iterator[Problem]:
        """A problem for every setting (also of the second pass) that names something outside."""
        if self._open:
            return
        yield from self._of(raw, catalogue, "")
        second = raw.get(SECOND_PASS)
        if isinstance(second, Mapping):
            yield from self._of(second, catalogue, f"{SECOND_PASS}.")

    def _of(self, raw: Mapping[str, object], catalogue: Catalogue, prefix: str) -> Iterator[Problem]:
        for key, value in raw.items():
            parameter = catalogue.by_name.get(key) if isinstance(key, str) else None
            if parameter is None or parameter.spec.holds not in READS or not isinstance(value, str):
                continue
            if value.strip() not in ("", "None") and not self.allows(value, parameter.spec.holds):
                yield Problem(prefix + parameter.key, value, self.why())

    def allows(self, value: str, kind: str) -> bool:
        """Whether a text of this kind names something that may be read; a file need not exist for that."""
        if self._open or (kind == "model" and value == DEMO) or value in self._listed(kind):
            return True
        pasted = value.strip().strip('"')  # a run takes the quotes around a pasted folder away
        return self._inside(pasted, kind) and (kind == "folder" or self._inside(value, kind))

    def _inside(self, value: str, kind: str) -> bool:
        # A network path is refused before it is touched: asking for it would already log in to the other machine.
        if _NETWORK.match(value) or "\x00" in value or (ntpath.splitdrive(value)[0] and not Path(value).is_absolute()):
            return False
        given, folder = expanded(value), self._folders.get(kind)
        if folder is not None and not given.is_absolute():  # in the order in which a run looks
            beside = [folder / value, *(folder / f"{value}{end}" for end in SUFFIXES)]
            given = next((path for path in (given, *beside) if exists(path)), folder / value)
        return any(inside(given, root) for root in self._roots[kind])

    def why(self) -> str:
        """Why something is not allowed, and what to do."""
        if self._data_root is None:
            return (
                "lies outside the folders that may be read while others can reach this program. Start it with "
                "--data-root FOLDER to name one for training data."
            )
        return "lies outside the folder given with --data-root; put the files there."
