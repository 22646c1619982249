"""The memory of devices: what is free, what is given back, and how running out of it is recognised."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from typing import Any

import torch

_SHORTAGES = (
    "out of memory",  # CUDA, HIP, XPU and MPS in their own words
    "alloc_failed",  # cuBLAS and cuDNN, for their workspaces
    "defaultcpuallocator",  # torch's allocator of main memory, on every system
    "not enough memory",
    "insufficient memory",
    "cannot allocate memory",
    "out_of_device_memory",
    "invalid buffer size",  # MPS, for a single tensor that is larger than it takes
    "paging file is too small",  # Windows, when a file is mapped
)
"""What the messages of RuntimeError and OSError say then, in lower case."""


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same one; without an index it is the current one of its kind."""
    return one.type == other.type and (one.index is None or other.index is None or one.index == other.index)


def best_device() -> torch.device:
    """The best device of this machine: cuda, mps, cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that there is no memory left on a device or at all."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(error, (RuntimeError, OSError)) and any(part in str(error).lower() for part in _SHORTAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def let_go(error: BaseException) -> None:
    """Clear the variables of all finished calls that an error came through, and of those it was raised from.

    They hold what was being computed and often a model; without this it stays in memory for as long as the error is
    handled. The traceback can still be printed.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__]


def empty_caches() -> None:
    """Give memory that torch keeps for later, of every device that is in use, back to the system."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # asking must not be what starts CUDA
        torch.cuda.empty_cache()
    mps: Any = getattr(torch, "mps", None)
    if mps is not None and torch.backends.mps.is_available():
        mps.empty_cache()
    xpu: Any = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available() and xpu.is_initialized():
        xpu.empty_cache()


def give_back() -> None:
    """After a run or a picture: collect what nobody holds any more, then `empty_caches` and `trim_heap`."""
    gc.collect()
    empty_caches()
    trim_heap()


def trim_heap() -> None:
    """Give freed main memory back to the system where the C library keeps it for later: glibc does, by the gigabyte.

    Tensors below its threshold (up to 32 MB, mallopt(3)) lie in its heap, among others that stay.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int | None:
    """What this process could still allocate on a device, in bytes; None where that is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    mps: Any = getattr(torch, "mps", None)
    if device.type == "mps" and hasattr(mps, "recommended_max_memory"):
        return max(0, int(mps.recommended_max_memory()) - int(mps.current_allocated_memory()))
    return None


def used_bytes(device: torch.device) -> int | None:
    """What the tensors of this process take on a device, in bytes; None where that is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.memory_allocated(device))
    mps: Any = getattr(torch, "mps", None)
    if device.type == "mps" and mps is not None:
        return int(mps.current_allocated_memory())
    return None


class Peak:
    """The most that tensors took on a CUDA device since this was made; `bytes` is None on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type == "cuda" and torch.cuda.is_available()
        if self._counts:
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def bytes(self) -> int | None:
        """See above."""
        return int(torch.cuda.max_memory_allocated(self._device)) if self._counts else None
