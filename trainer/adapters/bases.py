"""Orthonormal bases made from the weights of a model, one pair per layer, kept in a file when the user wants that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.weights import weight_matrix, weight_of
from ..params.field import param
from ..paths import exists, expanded
from .file import checked_name, read_lora, write_lora

MARK, VERSION = "atelier_svd_cache", "1"
Pair = tuple[Tensor, Tensor]
"""D (k, in) with orthonormal rows and U (out, k) with orthonormal columns, float32 on the CPU."""


@dataclass(frozen=True)
class SvdParams:
    """Where decompositions of the weights are kept."""

    svd_cache_path: str = param(
        "",
        "File that keeps the decompositions of the model's weights for the next run. Empty computes them in every run.",
        "option",
        needs="svd",
        holds="file",
    )


def weight_bases(
    layers: Sequence[Layer],
    counts: Mapping[str, tuple[int, int]],
    make: Callable[[Tensor, int, int], Pair],
    name: str,
    path: str,
    tell: Callable[[str], None],
    device: torch.device | None = None,
) -> dict[str, Pair]:
    """`make(W (out, in), rows, columns)` for every layer, by key; `counts` says how many rows and columns it gets.

    With a `path`, pairs are taken from that file when it has them for the same weights (a hash names them) and kept
    there under `name`. Weights are decomposed on `device` where that is CUDA. Raises AdapterError when the file is
    something else.
    """
    kept, found, made = _read(path), {}, 0
    started = time.perf_counter()
    for layer in layers:
        rows, columns = counts[layer.key]
        weight = weight_of(layer.module).detach().flatten(1)
        label = f"{_hash(weight)}.{name}" if path else ""
        down, up = kept.get(f"{label}.down"), kept.get(f"{label}.up")
        if down is None or up is None or not _hold(down, up, weight, rows, columns):
            where = device if device is not None and device.type == "cuda" else torch.device("cpu")
            down, up = (basis.cpu().contiguous() for basis in make(weight.to(where), rows, columns))
            kept.update({f"{label}.down": down, f"{label}.up": up} if path else {})
            made += 1
        found[layer.key] = down[:rows].contiguous(), up[:, :columns].contiguous()
    seconds = time.perf_counter() - started
    if path and made:
        try:
            write_lora(expanded(path), kept, {MARK: VERSION}, overwrite=True)
        except AdapterError as fault:
            tell(f"svd_cache_path: the decompositions are not kept for the next run. {fault}")
            path = ""
    if made and seconds > 2:
        hint = f" Kept in {Path(path).name}." if path else " Set svd_cache_path to keep them for the next run."
        tell(f"The weights of {made} layers were decomposed in {seconds:.0f} s.{hint}")
    return found


def _hold(down: Tensor, up: Tensor, weight: Tensor, rows: int, columns: int) -> bool:
    """Whether a kept pair has the sizes of this weight and directions enough."""
    if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != (weight.shape[1], weight.shape[0]):
        return False
    return len(down) >= rows and up.shape[1] >= columns


def blank(layers: Sequence[Layer], counts: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Zeros in the place of what `weight_bases` makes, for adapters that get theirs from a state."""
    shapes = {layer.key: weight_matrix(layer.module) for layer in layers}
    return {
        key: (torch.zeros(rows, shapes[key][1]), torch.zeros(shapes[key][0], columns))
        for key, (rows, columns) in counts.items()
    }


def _read(path: str) -> dict[str, Tensor]:
    """The pairs of a cache file; none when there is no such file yet. Raises AdapterError when it is something else."""
    if not path:
        return {}
    place = checked_name(Path(path), "svd_cache_path")
    if not exists(place):
        return {}
    tensors, metadata = read_lora(place)
    if metadata.get(MARK) != VERSION:
        raise AdapterError(
            f"svd_cache_path = {place.name!r}: this file exists and was not written here (a cache of another program"
            " does not say which weights it belongs to). Give the name of a new file, or leave it empty."
        )
    return tensors


def _hash(weight: Tensor) -> str:
    data = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
    shape = "x".join(map(str, weight.shape))
    return hashlib.sha256(shape.encode() + data.tobytes()).hexdigest()[:32]
