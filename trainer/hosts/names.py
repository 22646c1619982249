"""From the names of models that a job holds to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import JobError, Problem
from ..paths import expanded, is_file
from ..places import BASE_MODEL

DEMO = "demo"
MODEL_SUFFIXES = (".safetensors", ".ckpt")


def find(
    name: str, field: str, folder: Path, problems: list[Problem], known: Callable[[str], str | None] | None = None
) -> str:
    """The full path of a model that a field names: a path, a name the host knows, a name below `folder`, or `demo`.

    What is not found is added to `problems`.
    """
    if name == DEMO:
        return str(BASE_MODEL)
    theirs = known(name) if known else None
    given = expanded(name)
    tries = [Path(theirs)] if theirs else [given, folder / name, *(folder / f"{name}{end}" for end in MODEL_SUFFIXES)]
    for path in tries:
        inside = ("config.json", "vae/config.json") if field == "vae" else ("unet/config.json",)
        if is_file(path) or any(is_file(path / config) for config in inside):
            return str(path.absolute())
    problems.append(
        Problem(field, name, "there is no such model. Refresh the list and choose from it, or give the path of a file.")
    )
    return ""


def problems_to_error(problems: list[Problem]) -> None:
    """Raise JobError when there is a problem."""
    if problems:
        raise JobError(problems)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths mean one file, through links too; files that are not there are compared by name."""
    try:
        return one.samefile(other)
    except OSError:
        return one == other
