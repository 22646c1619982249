"""The whole table of parameters: the core sections and what modes, adapter types and stages declare in their files."""

from __future__ import annotations

from functools import lru_cache

from ..adapters import export
from ..adapters.base import ADAPTERS
from ..modes.base import MODES, Mode
from ..params import core, network
from ..params.codec import Catalogue, ModeInfo
from ..stages.base import STAGES


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """Everything a job can say. Modes, adapter types and stages are what their registries hold."""
    modes, types, stages = dict(MODES.items()), dict(ADAPTERS.items()), dict(STAGES.items())
    owners = (*modes.values(), *types.values(), *stages.values())
    sections = dict.fromkeys(section for owner in owners for section in owner.sections)
    return Catalogue(
        sections=(*core.SECTIONS, network.NetworkOptions, *sections),
        modes={name: _info(name, mode) for name, mode in modes.items()},
        choices={"network_type": _plain_first(tuple(types))},
        aliases={"network_type": ADAPTERS.aliases()},
        types={name: kind.tags() for name, kind in types.items()},
        always=frozenset[str]().union(*(stage.needs for stage in stages.values())),
        notes={"network_type": {name: kind.help for name, kind in types.items()}},
        rules=(*network.RULES, *export.RULES, *dict.fromkeys(rule for owner in owners for rule in owner.rules)),
    )


def _plain_first(names: tuple[str, ...]) -> tuple[str, ...]:
    """Types in the order of a form: those of the default's file, then the others."""
    home = ADAPTERS.get(core.Network.network_type).__module__
    return tuple(sorted(names, key=lambda name: ADAPTERS.get(name).__module__ != home))


def _info(name: str, mode: type[Mode]) -> ModeInfo:
    """A mode as the table sees it; what concerns optimizer steps belongs to every pass of those that take them."""
    steps = frozenset({"steps"} if mode.steps else ())
    return ModeInfo(name, mode.help, mode.needs | steps, None if mode.second is None else mode.second | steps)
