"""Pickled checkpoints (`.ckpt`, `.pt`, `.bin`) as torch.save writes them, in the zip layout and in the one before it.

The pickle is read by `pickles`, which runs nothing; weights are mapped from the file. A zip record counts only when it
is stored as it is and lies whole inside the file, and no tensor is larger than what it stands in: nothing read takes
more memory than the file has bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pickles import MOST_BYTES, Made, Named, PickleError, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What the layout before torch 1.6 begins with."""

_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
}  # fmt: skip
_ALIGNMENT = 64
_MOST_AXES, _MOST_RECORDS = 8, 100_000


@dataclass(frozen=True)
class _Stored:
    """A storage a pickle refers to: `size` elements of a type, under a key; `offset` where it is part of another."""

    key: str
    dtype: torch.dtype
    size: int
    offset: int = 0


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may keep them under `state_dict`, on the CPU. Raises PickleError, OSError."""
    with open(path, "rb") as file:
        if not path.stat().st_size:
            raise PickleError("the file is empty")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a copy: the tensors can be written to
    whole, storages = (_zipped if content[:4] == b"PK\x03\x04" else _sequential)(path, content)
    if isinstance(whole, Mapping) and isinstance(whole.get("state_dict"), Mapping):
        whole = whole["state_dict"]
    if not isinstance(whole, Mapping):
        raise PickleError("it holds no table of tensors")
    found: dict[str, Tensor] = {}
    room = 2 * len(content)
    for name, value in whole.items():
        tensor = _tensor(value, storages)
        if tensor is not None:
            room -= tensor.numel() * tensor.element_size()
            if room < 0:
                raise PickleError("its tensors together are larger than the file")
            found[str(name)] = tensor
    return found


class _Storages:
    """The storages of a file by key, as flat tensors over the mapped file."""

    def __init__(self, content: mmap.mmap, places: Mapping[str, tuple[int, int]]) -> None:
        self._content, self._places = content, places  # key -> (first byte, bytes)

    def flat(self, stored: _Stored) -> Tensor:
        """All elements of a storage. Raises PickleError when the file does not have them."""
        if stored.key not in self._places:
            raise PickleError(f"the weights {stored.key[:40]!r} are missing")
        start, length = self._places[stored.key]
        begin, size = start + stored.offset * stored.dtype.itemsize, stored.size * stored.dtype.itemsize
        if stored.size < 0 or stored.offset < 0 or begin + size > start + length:
            raise PickleError(f"the weights {stored.key[:40]!r} are cut off")
        if not size:
            return torch.empty(0, dtype=stored.dtype)
        plain = torch.frombuffer(self._content, dtype=torch.uint8, count=size, offset=begin)
        return (plain.clone() if begin % _ALIGNMENT else plain).view(stored.dtype)


def _zipped(path: Path, content: mmap.mmap) -> tuple[Any, _Storages]:
    """The object and the storages of a file in the zip layout."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, LookupError, struct.error) as fault:
        raise PickleError(f"its zip directory is damaged ({fault})") from fault
    if len(records) > _MOST_RECORDS:
        raise PickleError(f"it has {len(records)} records, and at most {_MOST_RECORDS} are read")
    places = {record.filename: _place(record, content) for record in records}
    heads = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(heads) != 1:
        raise PickleError("it is a zip file, but not one that torch.save wrote: data.pkl is not in it once")
    prefix = heads[0].removesuffix("data.pkl")
    order = places.get(f"{prefix}byteorder")
    if order is not None and content[order[0] : order[0] + min(order[1], 9)] == b"big":
        raise PickleError("it was written on a machine with another order of bytes")
    start, length = places[heads[0]]
    if length > MOST_BYTES:
        raise PickleError(f"its pickle has more than {MOST_BYTES // 2**20} MiB")
    data = f"{prefix}data/"
    keyed = {name.removeprefix(data): place for name, place in places.items() if name.startswith(data)}
    return Unpickler(content[start : start + length], _stored).load(), _Storages(content, keyed)


def _place(record: zipfile.ZipInfo, content: mmap.mmap) -> tuple[int, int]:
    """First byte and length of a record's data. Raises PickleError unless it lies in the file as it is said to."""
    name = record.filename[:80]
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 or record.file_size != record.compress_size:
        raise PickleError(f"its record {name!r} is packed, and torch.save packs none; it may unpack to any size")
    head = content[record.header_offset : record.header_offset + 30]
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise PickleError(f"its record {name!r} is not where the zip directory says")
    names, extras = struct.unpack("<HH", head[26:30])
    start = record.header_offset + 30 + names + extras
    if start + record.file_size > len(content):
        raise PickleError(f"its record {name!r} is cut off")
    return start, record.file_size


def _sequential(path: Path, content: mmap.mmap) -> tuple[Any, _Storages]:
    """The object and the storages of a file in the layout before torch 1.6: pickles, then one storage after another."""
    sizes: dict[str, _Stored] = {}

    def stored(given: Any) -> _Stored:
        found = _stored(given)
        root = sizes.setdefault(found.key, found)
        if root.dtype != found.dtype:
            raise PickleError(f"the weights {found.key[:40]!r} have two types")
        return found

    reader = Unpickler(content[:MOST_BYTES], stored)
    if reader.load() != MAGIC or reader.load() != PROTOCOL:
        raise PickleError("it is no file that torch.save wrote")
    system = reader.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("it was written on a machine with another order of bytes")
    whole, keys = reader.load(), reader.load()
    places, at = {}, reader.file.tell()
    for key in keys if isinstance(keys, list) else ():
        root = sizes.get(key) if isinstance(key, str) else None
        if root is None:
            raise PickleError("its list of storages names one that no tensor has")
        head = content[at : at + 8]
        length = int.from_bytes(head, "little") * root.dtype.itemsize
        if len(head) < 8 or at + 8 + length > len(content):
            raise PickleError(f"the weights {root.key[:40]!r} are cut off")
        places[root.key] = at + 8, length
        at += 8 + length
    return whole, _Storages(content, places)


def _stored(given: Any) -> _Stored:
    """The storage that a persistent id stands for: ("storage", type, key, device, size[, part of another])."""
    if not isinstance(given, tuple) or len(given) < 5 or given[0] != "storage":
        raise PickleError("its pickle refers to something that is no storage")
    _, kind, key, _, size, *rest = given
    dtype = _DTYPES.get(kind.name) if isinstance(kind, Named) else None
    if dtype is None or not isinstance(key, str) or type(size) is not int:
        raise PickleError("its pickle refers to a storage of a kind that is not known")
    part = rest[0] if rest else None
    if part is None:
        return _Stored(key, dtype, size)
    if not isinstance(part, tuple) or len(part) != 3 or type(part[1]) is not int or type(part[2]) is not int:
        raise PickleError("its pickle refers to a part of a storage that is not known")
    return _Stored(key, dtype, part[2], part[1])


def _tensor(value: object, storages: _Storages) -> Tensor | None:
    """The tensor that a rebuilding call stands for; None for anything else."""
    name, given = _call_of(value)
    if name.startswith("_rebuild_parameter") and given:
        name, given = _call_of(given[0])
    if not name.startswith("_rebuild_tensor"):
        return None
    if len(given) < 4 or not isinstance(given[0], _Stored):
        raise PickleError("one of its tensors is damaged")
    stored, offset, size, stride = given[:4]
    flat = storages.flat(stored)
    if name == "_rebuild_tensor_v3":
        kind = given[6] if len(given) > 6 else None
        dtype = getattr(torch, kind.name, None) if isinstance(kind, Named) and kind.module == "torch" else None
        if not isinstance(dtype, torch.dtype) or len(flat) % dtype.itemsize:
            raise PickleError("one of its tensors has a type that is not known")
        flat = flat.view(dtype)
    return _laid_out(flat, offset, size, stride)


def _call_of(value: object) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of a call in a pickle; nothing for anything else."""
    if isinstance(value, Made) and isinstance(value.kind, Named) and isinstance(value.given, tuple):
        return value.kind.name, value.given
    return "", ()


def _laid_out(flat: Tensor, offset: object, size: object, stride: object) -> Tensor:
    """A tensor of that layout over a storage. Raises PickleError unless it lies inside, no element used twice."""
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    sizes: tuple[int, ...] = size if isinstance(size, tuple) else ()
    steps: tuple[int, ...] = stride if isinstance(stride, tuple) else ()
    right = len(sizes) == len(steps) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**40 for n in numbers)
    if not right or math.prod(sizes) > len(flat):
        raise PickleError("one of its tensors has a shape that its weights do not fill")
    start = numbers[0]
    last = start + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if math.prod(sizes) and last >= len(flat):
        raise PickleError("one of its tensors reaches beyond its weights")
    return flat.as_strided(sizes, steps, start if math.prod(sizes) else 0)
