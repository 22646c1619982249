"""The table as the reference page `docs/reference/parameters.md`."""

from __future__ import annotations

from .catalogue import Catalogue
from .core import GROUPS
from .table import Parameter
from .values import default_text, expectation

HEAD = """# Parameters

This page is generated from the table of parameters; change a parameter where it is declared, not here.

The key is the spelling in settings files, presets and `--set key=value`. On the command line the flag is the key with
`-` for `_` and without what is in brackets, as in `--network-rank 8`. An empty text, `null` and `"None"` mean "not
given", which is the default. Numbers may be written as text (`"1e-4"`). The names of a list may stand in one text with
commas between them. A `2nd pass` object holds the same keys for the second pass of modes that have one; what it lacks
has the default, not the first pass's value.
"""


def markdown(catalogue: Catalogue) -> str:
    """The reference page of everything in the catalogue."""
    parts = [HEAD]
    if catalogue.modes:
        parts.append("## Modes\n\n| mode | what it does |\n|---|---|")
        parts.append("\n".join(f"| {mode.name} | {_cell(mode.help)} |" for mode in catalogue.modes.values()) + "\n")
    for name, notes in catalogue.notes.items():
        parts.append(f"## {name}\n\n| name | what it is |\n|---|---|")
        parts.append("\n".join(f"| {choice} | {_cell(text)} |" for choice, text in notes.items()) + "\n")
    groups = dict.fromkeys((*GROUPS, *(parameter.spec.group for parameter in catalogue.parameters)))
    for group in groups:
        rows = [_row(catalogue, parameter) for parameter in catalogue.parameters if parameter.spec.group == group]
        if rows:
            parts.append(f"## {group}\n\n| key | value | default | modes | meaning |\n|---|---|---|---|---|")
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(catalogue: Catalogue, parameter: Parameter) -> str:
    choices = catalogue.choices_of(parameter)
    default = default_text(parameter, choices)
    cells = (
        f"`{parameter.key}`",
        expectation(parameter, choices),
        default if default in ("all", "empty") else f"`{default}`",
        _modes(catalogue, parameter),
        parameter.spec.help,
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _modes(catalogue: Catalogue, parameter: Parameter) -> str:
    if parameter.spec.needs in catalogue.always:
        return _shortened(catalogue, [mode.name for mode in catalogue.modes.values() if "steps" in mode.needs])
    types = [name for name, tags in catalogue.types.items() if parameter.spec.needs in tags]
    if types:
        return f"network_type {', '.join(types)}"
    modes = []
    for mode in catalogue.modes.values():
        if parameter.shown_in(mode.needs):
            modes.append(mode.name)
        elif mode.second is not None and parameter.shown_in(mode.second):
            modes.append(f"{mode.name} (2nd pass)")
    return _shortened(catalogue, modes)


def _shortened(catalogue: Catalogue, modes: list[str]) -> str:
    """The modes by name, or `all`, or `all but` the one that is missing."""
    missing = [name for name in catalogue.modes if name not in modes]
    if not missing:
        return "all"
    if len(missing) == 1 and len(modes) > 1 and len(modes) + 1 == len(catalogue.modes):
        return f"all but {missing[0]}"
    return ", ".join(modes) or "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
