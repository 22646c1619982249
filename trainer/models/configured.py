"""Modules of diffusers and transformers from configurations that a folder brings: the one place where their
constructors meet a stranger's values, and where what they raise becomes an error of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ..errors import ModelError, brief

T = TypeVar("T")

_COUNTS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "num_hidden_layers",
)  # fmt: skip
_LISTS = ("block_out_channels", "down_block_types", "up_block_types")
MOST_LEVELS = 16
LARGEST = 10_000_000


def built(make: Callable[[], T], config: Mapping[str, Any], what: str, tensors: int) -> T:
    """What `make` builds from `config`, whose weights are `tensors` in number.

    Raises ModelError when the values cannot be those of a model with that many tensors, or the library refuses them.
    """
    fault = _fault(config, tensors)
    if fault:
        raise ModelError(f"{what}: its config.json cannot be right: {fault}. Get the file again.")
    try:
        return make()
    except MemoryError:
        raise
    except Exception as error:  # the libraries check little: whatever their constructors run into
        raise ModelError(
            f"{what}: no model can be built from its config.json ({type(error).__name__}: {brief(str(error))}). Get the"
            " file again, or a version of the libraries that knows this configuration."
        ) from error


def number_of(config: Mapping[str, Any], name: str, what: str) -> float:
    """A number above 0 of a configuration. Raises ModelError for anything else."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < LARGEST:
        raise ModelError(f"{what}: {name} in its config.json is {brief(value)}; a number above 0 is right.")
    return float(value)


def _fault(config: Mapping[str, Any], tensors: int) -> str:
    """What no model of `tensors` weights can have; "" when all may be. Every layer has a tensor."""
    for name in _LISTS:
        value = config.get(name)
        if isinstance(value, (list, tuple)) and len(value) > MOST_LEVELS:
            return f"{name} has {len(value)} entries"
    for name in _COUNTS:
        total = sum(count for count in _whole(config.get(name)) if count > 0)
        if total > tensors:
            return f"{name} is {brief(config.get(name))}, and there are {tensors} tensors"
    large = next(((name, n) for name, value in config.items() for n in _whole(value) if abs(n) > LARGEST), None)
    return f"{large[0]} is {brief(large[1])}" if large else ""


def _whole(value: object) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, float) and abs(value) > LARGEST:
        yield LARGEST + 1
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _whole(part)
