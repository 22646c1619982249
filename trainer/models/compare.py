"""Comparing a loaded model with the file it came from: every tensor that is computed with is there, and begins as in
the file.

Both are brought to one spelling first, so that a program may keep a text encoder in another one than the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError, NotAdoptable
from ..jsontext import parse
from .assemble import recognise, used_of_text
from .detect import TEXT_PREFIXES, UNET, VAE
from .quantised import is_scale
from .single import read_tensors, source_of
from .source import Source

_COMPARED = 4096
"""Numbers of each tensor."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A model file: `tensors` by name, on `meta` where only their header was read, and the first rows of each, or of a
    contiguous view of it.
    """

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]
    rows: Callable[[Tensor, int], Tensor]


def compare(loaded: Source, path: Path, foreign: tuple[str, ...] = ()) -> tuple[frozenset[str], dict[str, str]]:
    """(tensor names, metadata) of a model's file, after what is loaded was compared with it.

    `foreign`: the name prefixes of parts that did not come from this file. Raises NotAdoptable when a tensor of the
    file is not loaded, or when the first rows of one differ: something has changed it that we do not know how to undo.
    """
    try:
        with stored(path) as file:
            for part, tensors in _parts(file, path).items():
                prefixes = {"unet": (UNET,), "vae": (VAE,)}.get(part, TEXT_PREFIXES)
                if not set(prefixes) & set(foreign):
                    _compare_part(part, loaded.parts.get(part, {}), tensors, file.rows, path.name)
            return frozenset(file.tensors), file.metadata
    except (SafetensorError, OSError, ModelError) as error:
        if isinstance(error, NotAdoptable):
            raise
        raise NotAdoptable(f"its file cannot be read to compare ({error})") from error


def _parts(file: Stored, path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file that are computed with, by part, in the one spelling."""
    scale = next(filter(is_scale, file.tensors), None)
    if scale is not None:
        raise NotAdoptable(f"the weights of its file are quantised ({scale} belongs to their storage)")
    source = source_of(file.tensors, file.metadata, path.stem, path)
    family = recognise(source)
    texts = {row.part: used_of_text(source, row) for row in family.texts}
    return {part: texts.get(part, tensors) for part, tensors in source.parts.items()}


def _compare_part(
    part: str,
    loaded: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    rows: Callable[[Tensor, int], Tensor],
    file: str,
) -> None:
    missing = [name for name in wanted if name not in loaded]
    if missing:
        raise NotAdoptable(
            f"{len(missing)} of the {len(wanted)} tensors that {file} has for its {part} are not loaded under a name "
            f"that is known here ({', '.join(missing[:3])})"
        )
    for name, tensor in wanted.items():
        live = loaded[name]
        if live.shape != tensor.shape:
            raise NotAdoptable(f"{part} {name} is {list(live.shape)}, and {list(tensor.shape)} in {file}")
        if tensor.ndim == 2 and not tensor.is_contiguous():  # a projection that multiplies from the other side
            live, tensor = live.T, tensor.T
        count = max(1, _COMPARED // max(1, tensor[:1].numel())) if tensor.ndim else 1
        first = rows(tensor, count)
        if not torch.equal(live[:count].detach().cpu(), first.to(live.dtype)):
            raise NotAdoptable(f"something has changed its weights ({part} {name} is not as in {file})")


@contextmanager
def stored(path: Path) -> Iterator[Stored]:
    """A model file, opened for its first rows. Raises ModelError, OSError, SafetensorError."""
    if path.suffix.lower() != ".safetensors":
        tensors, metadata = read_tensors(path)
        yield Stored(tensors, metadata, lambda tensor, count: tensor[:count])
        return
    with safe_open(str(path), framework="pt", device="cpu") as checked:
        names, metadata = list(checked.keys()), dict(checked.metadata() or {})
    # Read, not mapped: each mapped tensor would bring its neighbourhood into memory, tens of megabytes in all.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = parse(file.read(length))
        shapes = {name: _empty(header[name]) for name in names}
        entries = {id(tensor): header[name] for name, tensor in shapes.items()}
        yield Stored(shapes, metadata, lambda tensor, count: _rows(file, 8 + length, entries, tensor, count))


def _empty(entry: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise NotAdoptable(f"its file holds {entry['dtype']}, which cannot be compared")
    return torch.empty(entry["shape"], dtype=dtype, device="meta")


def _rows(file: BinaryIO, start: int, entries: Mapping[int, Mapping[str, Any]], view: Tensor, count: int) -> Tensor:
    """The first `count` rows of a contiguous view of a tensor; the data of the file begin at `start`."""
    whole = view if view._base is None else view._base
    entry = entries.get(id(whole))
    if entry is None or not view.is_contiguous() or not view.ndim:
        raise NotAdoptable(f"a tensor of its file {list(view.shape)} cannot be compared")
    shape = [min(count, view.shape[0]), *view.shape[1:]]
    file.seek(start + entry["data_offsets"][0] + view.storage_offset() * view.dtype.itemsize)
    data = bytearray(file.read(math.prod(shape) * view.dtype.itemsize))
    return torch.frombuffer(data, dtype=torch.uint8).view(view.dtype).view(shape)
