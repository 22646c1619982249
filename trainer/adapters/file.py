"""LoRA files: safetensors written whole or not at all, with kohya's hashes, and read without keeping the file open."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .. import writing
from ..errors import AdapterError
from ..jsontext import parse
from ..paths import expanded
from .checked import check_numbers

_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000
_TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Write a LoRA file and return where it is.

    A file that has the name is kept unless it may be overwritten: the new one gets "-1" (or the next free number). When
    it is this very file already, written by the same run, nothing is done. The bytes go to a temporary file beside the
    target, which is synced, read back and compared before it takes the name. On Windows a file that a WebUI has mapped
    cannot be replaced: then, after some retries, the new one gets a number too. With metadata, `sshs_model_hash`,
    `sshs_legacy_hash` and `modelspec.hash_sha256` are added. Raises AdapterError when the file cannot be written;
    nothing is left behind.
    """
    path = Path(path)
    body, entries = _serialized(tensors)
    complete = {**metadata, **_hashes(body, entries, metadata)}
    header = _header(entries, complete)
    try:
        known = [path] if overwrite else writing.taken(path)
        for there in known:
            if _same(there, body, complete):
                return there
        with writing.draft(path) as made:
            made.file.write(header)
            made.file.write(body)
            made.finish()
            _verify(made.path, header, body)
            return _take_name(made.path, path, overwrite)
    except OSError as error:
        message = f"Could not write {path}: {writing.why(error)}. Make room or choose another folder."
        raise AdapterError(message) from error


def name_note(wanted: Path, written: Path) -> str:
    """What to say when a file got another name than the one that was wanted; "" when it did not."""
    return "" if written == wanted else f"{wanted.name} is there already and was kept; the new file is {written.name}."


def checked_name(path: Path, field: str) -> Path:
    """Where a file is going to be written; `field` names the setting. Raises AdapterError for one we would not read."""
    path = expanded(path)
    if path.suffix.lower() != ".safetensors":
        raise AdapterError(f"{field} = {path.name!r}: the name of this file must end in .safetensors.")
    return path


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU, as stored) and metadata of a LoRA file; the file is closed afterwards. Raises AdapterError."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise AdapterError(
            f"{path.name} is not a .safetensors file. Other kinds can carry programs and are not opened; convert it."
        )
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        header = cast("dict[str, dict[str, str]]", parse(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    except FileNotFoundError as error:
        raise AdapterError(f"There is no LoRA file {path}. Check the name and the folder.") from error
    except OSError as error:
        raise AdapterError(f"Could not read {path}: {writing.why(error)}.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{path.name} is not a complete safetensors file ({error}). Get it again.") from error
    check_numbers(tensors, path.name)
    return tensors, dict(header.get("__metadata__") or {})


def model_hash(path: Path) -> str:
    """kohya's `sshs_model_hash`: SHA-256 of everything after the header, so that metadata can change without it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def legacy_hash(path: Path) -> str:
    """kohya's older hash: 8 hex digits of the SHA-256 of 64 KiB at 1 MiB (of nothing, when the file is smaller)."""
    with open(path, "rb") as file:
        file.seek(_LEGACY_START)
        return hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]


def _serialized(tensors: Mapping[str, Tensor]) -> tuple[memoryview, dict[str, object]]:
    """The tensor bytes in safetensors' order and their header entries."""
    content = safetensors.torch.save({name: tensors[name] for name in sorted(tensors)})
    end = 8 + int.from_bytes(content[:8], "little")
    return memoryview(content)[end:], json.loads(content[8:end])


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header with its length in front; written here, since the library's order of metadata is random."""
    content = {"__metadata__": dict(sorted(metadata.items())), **entries} if metadata else dict(entries)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hashes(body: memoryview, entries: Mapping[str, object], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hash keys; none for a file without kohya's keys. As kohya does, the older hash sees only the `ss_` keys."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    if not training:
        return {}
    whole = hashlib.sha256(body).hexdigest()
    start = max(0, _LEGACY_START - len(_header(entries, training)))
    legacy = hashlib.sha256(body[start : start + _LEGACY_LENGTH]).hexdigest()[:8]
    return {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{whole}"}


def _verify(path: Path, header: bytes, body: memoryview) -> None:
    """Read back what was written. Raises AdapterError when it differs."""
    digest, wanted = hashlib.sha256(), hashlib.sha256(header)
    wanted.update(body)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.digest() != wanted.digest():
        raise AdapterError(f"{path.name} reads back differently from what was written. Save to another disk.")
    with safetensors.safe_open(path, framework="pt") as file:
        file.keys()


def _take_name(temporary: Path, path: Path, overwrite: bool) -> Path:
    """Give the finished file its name, or the next free one where it is taken or its file is held open."""
    if overwrite:
        try:
            writing.replace(temporary, path)
            return path
        except PermissionError:
            return writing.claim(temporary, path, first=1)
    return writing.claim(temporary, path)


def _same(path: Path, body: memoryview, metadata: Mapping[str, str]) -> bool:
    """Whether a file holds these tensors and was written by the same run; the times of writing do not count."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if os.fstat(file.fileno()).st_size != 8 + length + len(body):
                return False
            header = json.loads(file.read(length))
            if _timeless(header.get("__metadata__") or {}) != _timeless(metadata):
                return False
            at = 0
            while chunk := file.read(1 << 20):
                if body[at : at + len(chunk)] != chunk:
                    return False
                at += len(chunk)
            return at == len(body)
    except (OSError, ValueError, AttributeError):
        return False


def _timeless(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in _TIMES}
