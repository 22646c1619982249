"""The table: what the sections declare, resolved once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .field import Spec

KINDS: Mapping[Any, str] = {
    str: "text", int: "int", float: "float", bool: "bool", tuple[str, ...]: "list", tuple[int, int]: "size",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter: `kind` is text, int, float, bool, list or size (height, width); an `optional` one may be None."""

    section: type
    attribute: str
    key: str
    kind: str
    optional: bool
    default: object
    spec: Spec

    def shown_in(self, needs: frozenset[str]) -> bool:
        """Whether a mode with these tags shows it."""
        return not self.spec.needs or self.spec.needs in needs


@cache
def parameters_of(section: type) -> tuple[Parameter, ...]:
    """The parameters a section declares. Raises ValueError for a declaration that no view could show."""
    hints = typing.get_type_hints(section)
    return tuple(_parameter(section, declared, hints[declared.name]) for declared in dataclasses.fields(section))


def _parameter(section: type, declared: dataclasses.Field[Any], hint: Any) -> Parameter:
    where = f"{section.__name__}.{declared.name}"
    spec = declared.metadata.get("param")
    if not isinstance(spec, Spec):
        raise ValueError(f"{where} is not declared with param(...)")
    kind_of, optional = _without_none(hint)
    if kind_of not in KINDS:
        raise ValueError(f"{where} has the type {hint}, which no view can show")
    if optional != (declared.default is None):
        raise ValueError(f"{where}: None is the default of exactly those parameters that may be None")
    kind, default = KINDS[kind_of], declared.default
    if kind == "float" and isinstance(default, int):
        raise ValueError(f"{where} is a float with the whole number {default} as default; write {default}.0")
    return Parameter(section, declared.name, spec.key or declared.name, kind, optional, default, spec)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        return (rest[0], True) if len(rest) == 1 else (hint, False)
    return hint, False
