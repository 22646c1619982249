"""LyCORIS's functional part, imported when a type needs it. Its modules, merges and reloads are not used."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

EAGER = "torch"
"""The backend asked for in every call: on a GPU the default would compile kernels inside the WebUI's process."""


@cache
def functional(name: str) -> ModuleType | None:
    """The module `lycoris.functional.<name>`; None where it is not installed or its torch is too old for it: there a
    type's own product, which is the same to rounding, stands in.
    """
    try:
        return importlib.import_module(f"lycoris.functional.{name}")
    except (ImportError, AttributeError):  # LyCORIS 4.1 asks torch for what came with 2.4; A1111 pins 2.1, Forge 2.3
        return None
