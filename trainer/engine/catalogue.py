"""The whole table of parameters: the core sections and what modes declare in their own files."""

from __future__ import annotations

from functools import lru_cache

from ..adapters.base import ADAPTERS
from ..modes.base import MODES
from ..params import core
from ..params.codec import Catalogue, ModeInfo


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """Everything a job can say. Modes and adapter types are what their registries hold."""
    modes = dict(MODES.items())
    sections = dict.fromkeys(section for mode in modes.values() for section in mode.sections)
    return Catalogue(
        sections=(*core.SECTIONS, *sections),
        modes={name: ModeInfo(name, mode.help, mode.needs) for name, mode in modes.items()},
        choices={"network_type": ADAPTERS.names()},
        aliases={"network_type": ADAPTERS.aliases()},
    )
