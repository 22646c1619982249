"""A two-way map of module names: LDM/sgm spelling ⇄ diffusers spelling."""

from __future__ import annotations

from collections.abc import Mapping


class NameMap:
    """Renames by the longest known prefix that ends at a dot. Built from pairs diffusers prefix → LDM prefix."""

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self._forward = dict(pairs)
        self._backward = {ldm: diffusers for diffusers, ldm in pairs.items()}

    def to_ldm(self, name: str) -> str | None:
        """The LDM spelling of a diffusers module or tensor name; None when it is unknown."""
        return _rename(name, self._forward)

    def to_diffusers(self, name: str) -> str | None:
        """The diffusers spelling of an LDM module or tensor name; None when it is unknown."""
        return _rename(name, self._backward)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    cut = len(name)
    while cut > 0:
        found = table.get(name[:cut])
        if found is not None:
            return found + name[cut:]
        cut = name.rfind(".", 0, cut)
    return None
