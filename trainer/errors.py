"""What can go wrong, as one tree: every error a user can cause or meet is an `AtelierError`.

A message says what was given, where, what would be right and what to do next. Anything that is not an `AtelierError`
is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass


def brief(value: object, limit: int = 120) -> str:
    """`repr` of anything a file can hold, shortened: safe for huge numbers, deep nesting and half symbols."""
    if isinstance(value, int) and value.bit_length() > 400:
        return f"a whole number of about {int(value.bit_length() * 0.30103)} digits"
    writer = reprlib.Repr()
    writer.maxstring = writer.maxlong = writer.maxother = limit
    writer.maxlevel = 3
    if isinstance(value, (list, tuple, dict, set, frozenset)) and not _plain(value):
        return f"{type(value).__name__} of {len(value)}"
    text = writer.repr(value)
    return text if len(text) <= 2 * limit else text[: 2 * limit] + "…"


def _plain(value: object, depth: int = 3) -> bool:
    """Whether `reprlib` can write it: no number in it is too long for `repr`."""
    if isinstance(value, int):
        return value.bit_length() <= 400
    if isinstance(value, dict):
        return depth == 0 or all(_plain(part, depth - 1) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth == 0 or all(_plain(part, depth - 1) for part in value)
    return True


class AtelierError(Exception):
    """An error whose text is meant for the user, shown without a traceback."""


class BusyError(AtelierError):
    """A WebUI cannot draw now, because its model is lent to a training."""


@dataclass(frozen=True)
class Problem:
    """One fault of a form: `field` is the JSON key, `value` what was given, `message` what is right and what to do."""

    field: str
    value: object
    message: str

    def __str__(self) -> str:
        return f"{self.field} = {brief(self.value)}: {self.message}"


class JobError(AtelierError):
    """A job that cannot start; carries all its problems at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ModelError(AtelierError):
    """A base model that cannot be used: file, architecture, vocabulary."""


class NotAdoptable(ModelError):
    """A loaded model whose tensors cannot be trained on as they are; the message says why. Its file has to be read."""


class DataError(AtelierError):
    """Pictures, captions or caches that cannot be used."""


class AdapterError(AtelierError):
    """An adapter that matches nothing, or a LoRA file that cannot be read or written."""


class TrainingError(AtelierError):
    """A run that had to stop: non-finite loss, lost state, full disk."""


class DivergedError(TrainingError):
    """A loss that is no longer a number: the learning rate was too high, or the precision too low."""


class MemoryShortageError(AtelierError):
    """A phase of a run that needs more memory than there is."""


def pip_install(*arguments: str) -> str:
    """The command that installs packages where this program runs; a bare `pip` is often another Python's."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return " ".join([python, "-m pip install", *arguments])


class MissingPackageError(AtelierError):
    """An optional package is not installed; names the setting, the package and the command."""

    def __init__(self, setting: str, package: str) -> None:
        self.package = package
        super().__init__(f"{setting} {self.told(package)}")

    @staticmethod
    def told(package: str) -> str:
        """What a setting lacks, for a message that begins with its name."""
        return f"needs the package {package}, which is not installed. Install it with: {pip_install(package)}"
