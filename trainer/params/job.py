"""A job: all settings of one training, complete, typed and frozen."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .table import Parameter, parameters_of

T = TypeVar("T")

SECOND_PASS = "2nd pass"
TRAINTRAIN = "traintrain"
"""Key under which our own files keep what came from a TrainTrain file and is not known here."""
NOTE = "note"
"""Key of our own files for a sentence about the settings, which is shown and not read."""

ALWAYS = ("format", "mode")


@dataclass(frozen=True)
class Job:
    """The sections of one job, and what belongs to it besides.

    `second` are the settings of the second pass: a job of its own whose missing keys have the defaults (not the first
    pass's values) and whose mode is the first pass's; None unless `use_2nd_pass_settings` is on and the mode has a
    second pass. `unused_second` is the second object of the file when it is not used, kept as it was. `traintrain` says
    that the settings came from a TrainTrain file, `unknown` are the keys of it that are not known here.
    """

    sections: tuple[object, ...]
    second: Job | None = None
    unused_second: Mapping[str, object] | None = field(default=None, hash=False)
    unknown: Mapping[str, object] = field(default_factory=dict, hash=False)
    traintrain: bool = False

    def __getitem__(self, section: type[T]) -> T:
        """The values of one section. Raises KeyError when the job does not have it."""
        for held in self.sections:
            if type(held) is section:
                return held
        raise KeyError(f"the job has no section {section.__name__}")

    def value(self, name: str) -> object:
        """The value of the parameter with this attribute name or key. Raises KeyError."""
        for held in self.sections:
            for parameter in _parameters(held):
                if name in (parameter.attribute, parameter.key):
                    return getattr(held, parameter.attribute)
        raise KeyError(f"the job has no parameter {name}")

    def replace(self, **values: object) -> Job:
        """The same job with other values by attribute name, taken as they are. Raises TypeError for an unknown name."""
        sections = []
        for held in self.sections:
            mine = {p.attribute: values.pop(p.attribute) for p in _parameters(held) if p.attribute in values}
            sections.append(dataclasses.replace(held, **mine) if mine else held)  # type: ignore[type-var]
        if values:
            raise TypeError(f"a job has no parameter {', '.join(values)}")
        return dataclasses.replace(self, sections=tuple(sections))

    def to_dict(self, full: bool = False) -> dict[str, object]:
        """Plain JSON values: format, mode and what differs from its default, or everything when `full`."""
        written: dict[str, object] = {}
        for held in self.sections:
            for parameter in _parameters(held):
                value = getattr(held, parameter.attribute)
                if full or parameter.attribute in ALWAYS or value != parameter.default:
                    written[parameter.key] = _plain(parameter, value)
        if self.second is not None:
            written[SECOND_PASS] = self.second.to_dict(full)
        elif self.unused_second is not None:
            written[SECOND_PASS] = copy.deepcopy(dict(self.unused_second))
        if self.traintrain:
            written[TRAINTRAIN] = copy.deepcopy(dict(self.unknown))
        return written


def _plain(parameter: Parameter, value: object) -> object:
    if parameter.kind == "size" and isinstance(value, tuple):
        return value[0] if value[0] == value[1] else f"{value[0]},{value[1]}"
    return list(value) if isinstance(value, tuple) else value


def _parameters(held: object) -> tuple[Parameter, ...]:
    section: type = type(held)
    return parameters_of(section)
