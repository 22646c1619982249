"""What settings a LoRA file was made with, as far as its tensors tell: for the error of someone who chose others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .base import is_wide
from .file_delta import MAGNITUDE, MID, alpha_of, rank_of, recognised

Seen = tuple[str, str, Mapping[str, Tensor]]
"""Kind and block of a layer, and what a file has for it."""

_CORES = (MID, "hada_t1", "lokr_t2")


def described(layers: Iterable[Seen]) -> str:
    """A sentence with the settings that fit the file; "" when nothing can be said."""
    layers = list(layers)
    kinds = sorted({found for kind, _, tensors in layers if (found := _type(kind, tensors))})
    if "c3lier" in kinds and "lierla" in kinds:
        kinds.remove("lierla")
    if len(kinds) != 1:
        return f"The file mixes {', '.join(kinds)}." if kinds else ""
    settings = [f"network_type {kinds[0]}"]
    if any(MAGNITUDE in tensors for _, _, tensors in layers):
        settings.append("use_dora true")
    if any(core in tensors for _, _, tensors in layers for core in _CORES):
        settings.append("network_tucker true")
    settings += _numbers([layer for layer in layers if not is_wide(layer[0])], "network_")
    settings += _numbers([layer for layer in layers if is_wide(layer[0])], "network_conv_")
    return f"The file looks like {', '.join(settings)}."


def _type(kind: str, tensors: Mapping[str, Tensor]) -> str:
    form = recognised(tensors)
    if form is None or form.name != "lora":
        return "" if form is None else form.name
    return "c3lier" if is_wide(kind) else "lierla"


def _numbers(layers: list[Seen], prefix: str) -> list[str]:
    """Rank and alpha of these layers, by block where they differ."""
    found = []
    for name, of in (("rank", rank_of), ("alpha", _alpha)):
        values = [(block, value) for _, block, tensors in layers if (value := of(tensors))]
        counts: dict[float, int] = {}
        for _, value in values:
            counts[value] = counts.get(value, 0) + 1
        if not counts:
            continue
        usual = max(counts, key=lambda value: counts[value])
        found.append(f"{prefix}{name} {usual:g}")
        others = {block: value for block, value in values if value != usual}
        if others and prefix == "network_":
            found.append(f"network_block_{name}s {';'.join(f'{block}={value:g}' for block, value in others.items())}")
    return found


def _alpha(tensors: Mapping[str, Tensor]) -> float:
    return (alpha_of(tensors) or 0.0) if rank_of(tensors) else 0.0
