"""The table as a command line: one flag per parameter, and `key=value` pairs laid over a settings file."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence

from ..errors import JobError, Problem
from . import kohya
from .catalogue import Catalogue
from .core import GROUPS, SECTIONS
from .job import SECOND_PASS
from .table import Parameter
from .values import default_text, did_you_mean, expectation

PREFIX = "param:"
"""What the flags' names in the namespace begin with, so that they cannot meet those of other flags."""


def apply_overrides(
    raw: Mapping[str, object], pairs: Sequence[str], catalogue: Catalogue | None = None
) -> dict[str, object]:
    """`raw` with `key=value` pairs laid over it; values stay text, `load` types them.

    `2nd pass.key=value` goes to the second pass. Keys may be spelt as in JSON or as attributes; without a catalogue the
    core parameters are known. Raises JobError with every pair that is not one, names nothing, or repeats another.
    """
    table = catalogue or Catalogue(SECTIONS)
    first: dict[str, object] = {}
    second: dict[str, object] = {}
    problems = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        inside, name = _split(key.strip())
        target = second if inside else first
        fault = _pair_fault(pair, name, table)
        parameter = table.by_name.get(name)
        if parameter is not None and not fault:
            fault = f"gives {parameter.key} a second time; keep one." if parameter.attribute in target else ""
            target[parameter.attribute] = value
        if fault:
            problems.append(Problem("--set", pair, fault))
    if problems:
        raise JobError(problems)
    return lay_over(raw, {**first, SECOND_PASS: second} if second else first, table)


def lay_over(raw: Mapping[str, object], values: Mapping[str, object], catalogue: Catalogue) -> dict[str, object]:
    """`raw` with `values` in place of its own, whichever spelling of a key either uses; so too in a second pass."""
    laid = dict(raw)
    for name, value in values.items():
        parameter = catalogue.by_name.get(name)
        held = laid.get(name)
        if name == SECOND_PASS and isinstance(value, Mapping):
            laid[name] = lay_over(held if isinstance(held, Mapping) else {}, value, catalogue)
        elif parameter is None:
            laid[name] = value
        else:
            spelling = parameter.key if parameter.key in laid else parameter.attribute
            laid.pop(parameter.attribute, None)
            laid[spelling] = value
    return laid


def add_flags(parser: argparse.ArgumentParser, catalogue: Catalogue) -> None:
    """Add a flag for every parameter but `format`, in the groups of the tab. A flag not given leaves no trace."""
    groups = {parameter.spec.group: None for parameter in catalogue.parameters}
    for name in sorted(groups, key=lambda group: GROUPS.index(group) if group in GROUPS else len(GROUPS)):
        group = parser.add_argument_group(name)
        for parameter in catalogue.parameters:
            if parameter.spec.group == name and parameter.attribute != "format":
                _add_flag(group, parameter, catalogue)


def collect_flags(namespace: argparse.Namespace) -> dict[str, object]:
    """The values of the flags that were given, by attribute name; lay them over a file with `lay_over`."""
    given = vars(namespace).items()
    return {name[len(PREFIX) :]: value for name, value in given if name.startswith(PREFIX)}


def flag(parameter: Parameter) -> str:
    """`--network-rank` for `network_rank`."""
    return "--" + parameter.attribute.replace("_", "-").lower()


def unknown_flag_hint(unknown: Iterable[str], catalogue: Catalogue) -> str:
    """A sentence naming the nearest flag for each unknown one, "" when none is near."""
    flags = [flag(parameter) for parameter in catalogue.parameters]
    hints = []
    for word in unknown:
        name = word.partition("=")[0].lower()
        near = difflib.get_close_matches(name, flags, n=1)
        if word.startswith("--") and (known := kohya.hint(name)):
            hints.append(f"{word}:{known}")
        elif word.startswith("--") and near:
            hints.append(f"{word}: did you mean {near[0]}?")
    return " ".join(hints)


def _pair_fault(pair: str, name: str, catalogue: Catalogue) -> str:
    if "=" not in pair or not name:
        return "must be key=value, for example network_rank=8."
    if name in catalogue.by_name:
        return ""
    known = {known.lower(): parameter.key for known, parameter in catalogue.by_name.items()}
    if there := kohya.hint(name):
        return f"names no setting.{there} {kohya.advice(name)}"
    return f"names no setting.{did_you_mean(name, known)} Correct its spelling."


def _split(key: str) -> tuple[bool, str]:
    prefix = f"{SECOND_PASS}."
    return (True, key[len(prefix) :].strip()) if key.startswith(prefix) else (False, key)


def _add_flag(group: argparse._ArgumentGroup, parameter: Parameter, catalogue: Catalogue) -> None:
    right = expectation(parameter, catalogue.choices_of(parameter))
    default = default_text(parameter, catalogue.choices_of(parameter))
    text = f"{parameter.spec.help} ({right}; default: {default})".replace("%", "%%")
    if parameter.kind == "bool":
        group.add_argument(
            flag(parameter),
            dest=PREFIX + parameter.attribute,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=text,
        )
        return
    group.add_argument(
        flag(parameter),
        dest=PREFIX + parameter.attribute,
        metavar={"int": "N", "float": "X", "size": "H,W", "list": "A,B"}.get(parameter.kind, "TEXT"),
        default=argparse.SUPPRESS,
        help=text,
    )
