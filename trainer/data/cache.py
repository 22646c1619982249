"""A cache of tensors that is only believed when it proves itself: in memory, and on disk one file per entry.

An entry's key is a fingerprint of everything it was made from. Its file is named by the key, carries the key and a
digest of its contents, and is written beside its place and moved there whole. Whatever does not check out counts as
absent, so it is made again.

The folder is kept small when it is opened: entries that nobody used for a long time go, and above a size the ones used
longest ago. Whatever was used within a day may belong to a run beside this one and stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors

from .. import writing
from ..jsontext import parse

Tensors = dict[str, torch.Tensor]
CACHE_VERSION = 1
KEEP_BYTES = 20 * 2**30
_DAY = 24 * 3600.0
_FORGOTTEN_SECONDS = 60 * _DAY


def fingerprint(**facts: object) -> str:
    """A hexadecimal SHA-256 of the facts (JSON values and tuples) and of the version of this cache."""
    text = json.dumps({"cache": CACHE_VERSION, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class TensorCache:
    """Named float tensors by key, held in memory and, when a folder is given, kept on disk.

    With a folder, at most `hold_bytes` stay in memory and the rest is read again when needed; opening it removes old
    entries above `keep_bytes` (see `_trim`). What the disk does not take is held in memory, and `warn` hears of it
    once. Without a folder, nothing touches the disk and everything is held. Safe to use from several threads and
    processes.
    """

    def __init__(
        self,
        folder: Path | None,
        hold_bytes: int = 2**30,
        keep_bytes: int = KEEP_BYTES,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder = folder
        self._hold_bytes = hold_bytes
        self._held: dict[str, Tensors] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._warn, self._warned = warn, False
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                writing.sweep(folder, all_ours=True)
                _trim(folder, keep_bytes)
            except OSError as error:
                self._cannot_write(error)

    @property
    def on_disk(self) -> bool:
        """Whether entries outlive the process."""
        return self._folder is not None

    def get(self, key: str) -> Tensors | None:
        """The entry, or None when there is none that can be trusted. The tensors are shared: do not change them."""
        held = self._held.get(key)
        if held is not None or self._folder is None:
            return held
        path = self._path(key)
        tensors = _read(path, key)
        if tensors is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of last use, by which old entries are found
            self._hold(key, tensors)
        return tensors

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Enters finite tensors under `key` as float32 on the CPU.

        Raises ValueError for tensors that are not finite.
        """
        entry = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in tensors.items()
        }
        if not _finite(entry):
            raise ValueError("only finite tensors can be cached")
        written = False
        if self._folder is not None:
            try:
                _write(self._path(key), key, entry)
                written = True
            except OSError as error:
                self._cannot_write(error)
        self._hold(key, entry, always=not written)

    def _cannot_write(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"The cache folder {str(self._folder)!r} cannot be written: {writing.why(error)}. What does not "
                "fit stays in memory for this run and is encoded again in the next. Make room, or set data_cache = "
                "memory."
            )

    def _path(self, key: str) -> Path:
        return Path(self._folder or "") / f"{key}.safetensors"

    def _hold(self, key: str, tensors: Tensors, always: bool = False) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with self._lock:
            fits = always or self._held_bytes + size <= self._hold_bytes
            if fits and key not in self._held:
                self._held[key] = tensors
                self._held_bytes += size


def _read(path: Path, key: str) -> Tensors | None:
    try:
        data = path.read_bytes()  # not mapped: a mapped file cannot be replaced on Windows
        length = int.from_bytes(data[:8], "little")
        header: Any = parse(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        tensors = parse_tensors(data)
        if metadata.get("fingerprint") != key or metadata.get("digest") != _digest(tensors):
            return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError):
        return None
    return tensors if _finite(tensors) else None


def _write(path: Path, key: str, tensors: Tensors) -> None:
    metadata = {"fingerprint": key, "digest": _digest(tensors), "version": str(CACHE_VERSION)}
    try:
        writing.write_whole(path, pack_tensors(tensors, metadata=metadata))
    except PermissionError:
        # On Windows another process may be reading the same entry this moment; a good one need not be replaced.
        if _read(path, key) is None:
            raise


def _trim(folder: Path, keep_bytes: int) -> None:
    """Deletes entries unused for two months, and above `keep_bytes` (or half of the room there is) the oldest ones."""
    now, entries = time.time(), []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            seen = path.stat()
            entries.append((seen.st_mtime, seen.st_size, path))
    total = sum(size for _, size, _ in entries)
    limit = min(keep_bytes, (total + shutil.disk_usage(folder).free) // 2)
    for used, size, path in sorted(entries):
        if now - used < _DAY or (total <= limit and now - used < _FORGOTTEN_SECONDS):
            break
        with contextlib.suppress(OSError):  # another process was faster, or reads it this moment on Windows
            path.unlink()
        total -= size


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
