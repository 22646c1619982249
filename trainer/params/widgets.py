"""The table as a form: plain descriptions, from which any user interface can build its widgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import AtelierError
from .catalogue import Catalogue
from .core import GROUPS
from .field import ModeInfo
from .table import Parameter
from .values import did_you_mean

KINDS = {"text": "text", "int": "number", "float": "number", "size": "text", "bool": "check", "list": "checks"}


@dataclass(frozen=True)
class Widget:
    """One field of the form. `kind` is text, number, check, choice or checks; `low`/`high` are bounds in `unit`.

    `key` is the JSON key, `attribute` its plain spelling (fit for an id). `whole` says that a number has no fraction,
    `multiple` that it must be a multiple (0 = any). `holds`: what a text stands for (see `Spec`). `visible` says
    whether the mode shows it, `notes` what each of its choices is, where that is told.
    """

    key: str
    attribute: str
    label: str
    kind: str
    choices: tuple[str, ...]
    default: object
    help: str
    group: str
    advanced: bool
    unit: str
    low: float | None
    high: float | None
    whole: bool
    multiple: int
    holds: str
    visible: bool
    notes: Mapping[str, str] = field(default_factory=dict)


def widgets(catalogue: Catalogue, mode: str, second: bool = False, network_type: str = "lierla") -> tuple[Widget, ...]:
    """All fields in the order of the form, with `visible` for `mode` (or its second pass) and the adapter type. Raises
    AtelierError for an unknown mode. `format` is no field."""
    info = _mode(catalogue, mode)
    needs = catalogue.tags(info, network_type, second)
    hidden_pass = second and info.second is None
    order = {group: index for index, group in enumerate(GROUPS)}
    fields = [parameter for parameter in catalogue.parameters if parameter.attribute != "format"]
    fields.sort(key=lambda parameter: order.get(parameter.spec.group, len(order)))
    return tuple(_widget(catalogue, field, field.shown_in(needs) and not hidden_pass) for field in fields)


def _mode(catalogue: Catalogue, mode: str) -> ModeInfo:
    if mode not in catalogue.modes:
        near = did_you_mean(mode, {name.lower(): name for name in catalogue.modes})
        raise AtelierError(f"mode {mode!r} is not known.{near} Known: {', '.join(catalogue.modes)}.")
    return catalogue.modes[mode]


def _widget(catalogue: Catalogue, parameter: Parameter, visible: bool) -> Widget:
    spec, choices = parameter.spec, catalogue.choices_of(parameter)
    default = parameter.default
    if isinstance(default, tuple):
        default = ",".join(dict.fromkeys(map(str, default))) if parameter.kind == "size" else list(default)
    return Widget(
        key=parameter.key,
        attribute=parameter.attribute,
        label=parameter.key.replace("_", " "),
        kind="choice" if choices and parameter.kind == "text" else KINDS[parameter.kind],
        choices=choices,
        default=default,
        help=spec.help,
        group=spec.group,
        advanced=spec.advanced,
        unit=spec.unit,
        low=spec.low,
        high=spec.high,
        whole=parameter.kind == "int",
        multiple=spec.multiple,
        holds=spec.holds,
        visible=visible,
        notes=catalogue.notes.get(parameter.attribute, {}),
    )
