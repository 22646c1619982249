"""Which layers types sit on, by the words of kohya's and LyCORIS's trainers, and rules about settings they ignore."""

from __future__ import annotations

from collections.abc import Callable

from ..contracts import RESIDUAL, TRANSFORMER, Layer
from ..params import core
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.rules import Rule
from .base import ADAPTERS, is_wide

_ATTENTION_KINDS = ("linear", "conv1x1")


def in_transformer(layer: Layer) -> bool:
    """Linear layers and 1×1 convolutions of transformer blocks, linear layers of text encoders (lierla)."""
    return layer.role in TRANSFORMER and layer.kind in _ATTENTION_KINDS


def in_any_block(layer: Layer) -> bool:
    """The same, and the convolutions, samplers and time projections of the UNet's residual blocks (c3lier)."""
    return in_transformer(layer) or (layer.role in RESIDUAL and (layer.kind in _ATTENTION_KINDS or is_wide(layer.kind)))


def ignores(kind: str, *names: str) -> tuple[Rule, ...]:
    """Rules that warn of parameters of the core section Network that have no effect on a type."""
    return tuple(_ignored(kind, name) for name in names)


def _ignored(kind: str, name: str) -> Rule:
    default = core.Network.__dataclass_fields__[name].default

    def check(job: Job, mode: ModeInfo) -> str:
        network = job[core.Network]
        if ADAPTERS.canonical(network.network_type) != kind or getattr(network, name) == default:
            return ""
        return f"has no effect with network_type {kind}."

    return Rule((name, "network_type"), check, warning=True)


def strength_of_one(kind: str, why: str, when: Callable[[Job], bool] = lambda job: True) -> Rule:
    """The rule that a type whose file has no place for a strength (with the settings of `when`) is saved at 1."""

    def check(job: Job, mode: ModeInfo) -> str:
        network = job[core.Network]
        if ADAPTERS.canonical(network.network_type) != kind or network.network_strength == 1.0 or not when(job):
            return ""
        return f"cannot be written into a file of network_type {kind}: {why}. Set 1, and choose it when using the file."

    return Rule(("network_strength", "network_type"), check)
