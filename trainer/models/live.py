"""Adopting a model that is loaded in another program: its tensors go into our own modules and share their storage.

Nothing of the other program is changed by it. Its modules may be patched, and their parameters may be inference
tensors, which autograd refuses; ours are plain modules around normal tensors on the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..jsontext import parse
from . import noise
from .assemble import assemble
from .base import Model
from .detect import TEXT_PREFIXES, UNET, VAE
from .load import replace_vae
from .quantised import is_scale
from .single import read_tensors, source_of
from .source import Source
from .texts import replace_texts

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_COMPARED = 4096
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class NotAdoptable(ModelError):
    """A loaded model whose tensors cannot be trained on as they are; the message says why. Its file has to be read."""


@dataclass(frozen=True)
class Live:
    """A model that another program has loaded, as plain facts.

    `tensors` have the names of a checkpoint file in LDM/sgm spelling; `path` is that file. `prediction` is what the
    program takes the model for (None: not known), `sha256` the file's hash where it is known already, `foreign` the
    name prefixes of parts that did not come from the file (another VAE).
    """

    path: Path
    tensors: Mapping[str, Tensor]
    prediction: str | None = None
    sha256: str = ""
    foreign: tuple[str, ...] = ()


def adopt(
    live: Live,
    *,
    v_pred: bool = False,
    storage: torch.dtype | None = None,
    vae_path: Path | None = None,
    text_paths: Sequence[Path] = (),
    vae_storage: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vocabularies: Sequence[Path] = (),
) -> Model:
    """Our own modules around the tensors of a loaded model.

    They are computed with on `device` (None: where the UNet is) and rest where they are until they are needed, and again
    afterwards. Where neither device nor precision changes, nothing is copied. Raises NotAdoptable when the tensors are quantised, spread
    over devices, or differ from the file; ModelError as for a file.
    """
    check_plain(live.tensors)
    names, metadata = check_unchanged(live)
    tensors = {name: normal(tensor) for name, tensor in live.tensors.items()}
    source = source_of(tensors, metadata, live.path.stem, live.path)
    source.noise = _noise(live, names, metadata)
    if vae_path is not None:
        replace_vae(source, vae_path)
    if text_paths:
        replace_texts(source, text_paths)
    there = _device(source) if device is None else torch.device(device)
    model = assemble(
        source,
        v_pred=v_pred,
        storage=storage,
        vae_storage=vae_storage,
        device=there,
        vocabularies=vocabularies,
        resting=True,
    )
    model.set_home(model.parts, storages(live.tensors.values()))
    model.known_hash(live.sha256)
    return model


def normal(tensor: Tensor) -> Tensor:
    """A normal tensor, without gradient, on the storage of another one, which may be an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and size in bytes of the distinct storages behind tensors."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def copied_bytes(model: Model, live: Live) -> int:
    """Bytes of a model's weights that do not lie in the storages of the loaded one."""
    mine = storages(p for part in model.parts for p in part.parameters())
    theirs = storages(live.tensors.values())
    return sum(size for address, size in mine.items() if address not in theirs)


def check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Raise NotAdoptable unless all tensors are dense ones of a usual precision and the UNet lies on one device."""
    devices = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise NotAdoptable(f"its weights are packed ({name} is {type(tensor).__name__})")
        if name.endswith(".weight") and tensor.dtype not in PLAIN:
            raise NotAdoptable(f"its weights are quantised ({name} is {_plainly(tensor.dtype)})")
        if is_scale(name):
            raise NotAdoptable(f"its weights are quantised ({name} belongs to their storage)")
        if tensor.is_meta:
            raise NotAdoptable("it is not in memory at the moment")
        if name.startswith(UNET):
            devices.add(tensor.device)
    if len(devices) > 1:
        raise NotAdoptable(f"it is spread over {' and '.join(sorted(map(str, devices)))}")


def check_unchanged(live: Live) -> tuple[frozenset[str], dict[str, str]]:
    """(tensor names, metadata) of the model's file, after the first rows of every weight were compared with the loaded
    ones.

    Raises NotAdoptable at the first that differs: something has changed the weights that we do not know how to undo.
    """
    wanted = [name for name in live.tensors if name.startswith((UNET, *TEXT_PREFIXES)) and name.endswith(".weight")]
    wanted = [name for name in wanted if not live.foreign or not name.startswith(live.foreign)]
    try:
        with _opened(live.path) as file:
            both = [name for name in wanted if name in file.names]
            for name in both:
                _compare(name, live.tensors[name], file.rows, live.path.name)
    except (SafetensorError, OSError, ModelError) as error:
        if isinstance(error, NotAdoptable):
            raise
        raise NotAdoptable(f"its file cannot be read to compare ({error})") from error
    if not both:
        raise NotAdoptable(f"it cannot be compared with {live.path.name}")
    return file.names, file.metadata


def _compare(name: str, tensor: Tensor, rows: Callable[[str, int], Tensor], file: str) -> None:
    """Raise NotAdoptable when the first rows of a loaded tensor are not those of the file."""
    count = max(1, _COMPARED // max(1, tensor[:1].numel()))
    loaded = tensor[:count].detach().cpu()
    stored = rows(name, count)
    if loaded.shape != stored.shape or not torch.equal(loaded, stored.to(loaded.dtype)):
        raise NotAdoptable(f"something has changed its weights ({name} is not as in {file})")


@dataclass(frozen=True)
class _File:
    """Names, metadata and the first rows of tensors of a model file."""

    names: frozenset[str]
    metadata: dict[str, str]
    rows: Callable[[str, int], Tensor]


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    if path.suffix.lower() != ".safetensors":
        tensors, metadata = read_tensors(path)
        yield _File(frozenset(tensors), metadata, lambda name, count: tensors[name][:count])
        return
    with safe_open(str(path), framework="pt", device="cpu") as checked:
        names, metadata = frozenset(checked.keys()), dict(checked.metadata() or {})
    # Read, not mapped: each mapped tensor would bring its neighbourhood into memory, tens of megabytes in all.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse(file.read(length))
        yield _File(names, metadata, lambda name, count: _rows(file, 8 + length, header[name], count))


def _rows(file: BinaryIO, start: int, entry: Mapping[str, Any], count: int) -> Tensor:
    """The first `count` rows of the tensor that an entry of a safetensors header describes; its data begin at `start`."""
    dtype, shape = _DTYPES.get(entry["dtype"]), [min(count, entry["shape"][0]), *entry["shape"][1:]]
    if dtype is None:
        raise NotAdoptable(f"its file holds {entry['dtype']}, which cannot be compared")
    file.seek(start + entry["data_offsets"][0])
    data = bytearray(file.read(math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def _noise(live: Live, names: frozenset[str], metadata: Mapping[str, str]) -> noise.NoiseFacts:
    """What the file says of the prediction type; where it is silent, what the program takes the model for."""
    facts = noise.noise_of_file(names, metadata, live.path)
    if facts.prediction is None and live.prediction is not None:
        return noise.NoiseFacts(live.prediction, facts.zero_snr, facts.alphas_T)
    return facts


def is_vae(path: Path) -> bool:
    """Whether a file holds a VAE and no whole model, by its tensor names."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return "vae" in path.name.lower()  # an old pickled file: its name has to do
    bare = {name.removeprefix(VAE).removeprefix("vae.") for name in names}
    return "decoder.conv_in.weight" in bare and not any(name.startswith(UNET) for name in names)


def is_clip(path: Path) -> bool:
    """Whether a file holds a CLIP text encoder and no whole model, by its tensor names."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return False
    tokens = ("embeddings.token_embedding.weight", "token_embedding.weight")
    return any(name.endswith(tokens) for name in names) and not any(name.startswith(UNET) for name in names)


def _device(source: Source) -> torch.device:
    return next(iter(source.parts["unet"].values())).device


def _plainly(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


