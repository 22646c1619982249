"""How a parameter is declared: a dataclass field whose metadata says everything its views need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """What the table says of one parameter beside its name, type and default.

    `key`: its spelling in JSON when it differs from the attribute. `needs`: the tag a mode must carry to show it ("" =
    all modes). `low`/`high`: inclusive bounds in `unit`. `multiple`: the value must be a multiple of it (0 = any).
    `choices`: allowed values (a catalogue may give them instead). `advanced`: folded away in the tab. `holds`: what a
    text stands for, so that a form can offer it and a server guard it: lines, or what a run reads or writes: folder,
    picture, lora, model, vae, te, file ("" = plain text). `implies`: for a switch that, when on, is another spelling
    of (attribute, value).
    """

    help: str
    group: str
    key: str = ""
    needs: str = ""
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    multiple: int = 0
    unit: str = ""
    advanced: bool = True
    holds: str = ""
    implies: tuple[str, str] | None = None


def param(default: Any, help: str, group: str, **spec: Any) -> Any:
    """A dataclass field that is a parameter; `spec` are the other attributes of `Spec`."""
    return dataclasses.field(default=default, metadata={"param": Spec(help=help, group=group, **spec)})


@dataclass(frozen=True)
class ModeInfo:
    """A training mode as the table sees it.

    `needs`: the tags it carries; a parameter whose `Spec.needs` is among them is shown. `second`: the tags of its
    second pass, None when it has none.
    """

    name: str
    help: str
    needs: frozenset[str] = frozenset()
    second: frozenset[str] | None = None
