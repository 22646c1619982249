"""Which layers of a model get an adapter: by type, part, block and kind of attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from ..contracts import CROSS_ATTENTION, SELF_ATTENTION, Layer, Role
from ..errors import AdapterError
from ..params.network import NetworkOptions, name_chosen
from .base import ADAPTERS, AdapterSpec

EVERYTHING = frozenset(Role)
ELEMENTS = {
    "": EVERYTHING,
    "None": EVERYTHING,
    "Full": EVERYTHING,
    "CrossAttention": CROSS_ATTENTION,
    "SelfAttention": SELF_ATTENTION,
}


def choose(
    layers: Iterable[Layer], spec: AdapterSpec, blocks: Collection[str], element: str | None, parts: Collection[str]
) -> tuple[Layer, ...]:
    """The chosen layers in the order given.

    `blocks`: names such as BASE and IN00. `element`: Full, CrossAttention or SelfAttention (both take
    layers of the UNet only). `parts`: unet, te1, te2.
    Raises AdapterError when nothing is left, with the step that emptied the list.
    """
    kind = ADAPTERS.get(spec.type)
    if (element or "") not in ELEMENTS:
        raise AdapterError(f"network_element = {element!r} is not known. Known: Full, CrossAttention, SelfAttention.")
    roles = ELEMENTS[element or ""]
    everywhere = roles == EVERYTHING
    patterns = spec[NetworkOptions].network_name_filter
    left = list(layers)
    tests: tuple[tuple[str, Callable[[Layer], bool]], ...] = (
        (f"network_targets ({', '.join(sorted(parts)) or 'none'})", lambda layer: layer.part in parts),
        (f"network_type {spec.type}", lambda layer: kind.covers(layer, spec)),
        (
            f"network_element {element or 'Full'}",
            lambda layer: everywhere or (layer.part == "unet" and layer.role in roles),
        ),
        (f"network_blocks ({', '.join(sorted(blocks)) or 'none'})", lambda layer: layer.block in blocks),
        (f"network_name_filter {patterns}", lambda layer: name_chosen(patterns, _names(layer))),
    )
    for name, test in tests:
        before, left = len(left), [layer for layer in left if test(layer)]
        if not left:
            raise AdapterError(f"No layer is left to train: {name} excludes all {before} layers. Choose more there.")
    _refuse_twins(left)
    return tuple(left)


def _names(layer: Layer) -> tuple[str, ...]:
    """Every name by which a pattern may mean a layer: its key, the module's path, and other spellings of the key."""
    return (layer.key, layer.path, *layer.also)


def _refuse_twins(layers: Iterable[Layer]) -> None:
    seen: set[str] = set()
    for layer in layers:
        if layer.key in seen:
            raise AdapterError(f"Two layers of this model have the same name in a LoRA file: {layer.key}.")
        seen.add(layer.key)


def spelled(adapters: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """Every spelling of every key → the key itself; a key's own spelling wins over another's alias."""
    pairs = list(adapters)
    table = {alias: key for key, also in pairs for alias in also}
    table.update({key: key for key, _ in pairs})
    return table


def split_name(name: str, table: dict[str, str]) -> tuple[str, str] | None:
    """A file's tensor name as (key, rest), or None when no layer has that name."""
    for head, rest in _cuts(name):
        if head in table:
            return table[head], rest
    return None


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    place = name.find(".")
    while place >= 0:
        yield name[:place], name[place + 1 :]
        place = name.find(".", place + 1)
