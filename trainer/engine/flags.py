"""torch's process-wide switches for the time of a run, and what a card can do of itself.

Hosts set these for drawing (Forge Neo's --fast-fp16 adds up in fp16, A1111 switches TF32 on), so that one job would be
trained at another speed and exactness in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_ATTRIBUTES: tuple[tuple[str, str, bool], ...] = (
    ("cuda.matmul", "allow_fp16_accumulation", False),  # torch 2.7
    ("cudnn", "allow_tf32", True),
)
"""Module below torch.backends, its switch, and the value during a run. What a torch has not is left out."""

_FUNCTIONS: tuple[tuple[str, str, bool], ...] = (
    ("fp16_bf16_reduction_math_sdp_allowed", "allow_fp16_bf16_reduction_math_sdp", False),  # torch 2.5
    ("flash_sdp_enabled", "enable_flash_sdp", True),
    ("mem_efficient_sdp_enabled", "enable_mem_efficient_sdp", True),
    ("math_sdp_enabled", "enable_math_sdp", True),
)
"""Functions of torch.backends.cuda that ask and set, and the value during a run: fast attention where it can be had."""


@contextmanager
def training_flags(device: torch.device) -> Iterator[None]:
    """Inside the block the switches are right for training on `device` (and for our own sampling), which is the current
    one of this thread; after it they are as before, whatever happened.

    TF32 for float32 products (as cuDNN has it by default), sums of fp16 products in float32, fused attention;
    convolutions are tried out first (cudnn.benchmark) on a GTX 16xx alone, whose fp16 ones give NaN without. Nothing is
    changed for other devices than CUDA's.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    with ExitStack() as before:
        before.enter_context(torch.cuda.device(device))
        matmul = torch.backends.cuda.matmul
        if not _set(before, matmul, "allow_tf32", True):
            _set(before, matmul, "fp32_precision", "tf32")  # a host that uses the names of torch 2.9
        for place, name, value in (*_ATTRIBUTES, ("cudnn", "benchmark", is_gtx_16(device))):
            _set(before, _module(place), name, value)
        for ask, change, value in _FUNCTIONS:
            _call(before, getattr(torch.backends.cuda, ask, None), getattr(torch.backends.cuda, change, None), value)
        yield


def _module(place: str) -> Any:
    found: Any = torch.backends
    for name in place.split("."):
        found = getattr(found, name)
    return found


def _set(before: ExitStack, owner: Any, name: str, value: object) -> bool:
    """Change a switch until `before` closes. Returns whether it can be asked: this torch may not have it, or refuses to
    answer by an old name (RuntimeError) where a new one was used to set it.
    """
    try:
        old = getattr(owner, name)
    except (AttributeError, AssertionError, RuntimeError):
        return False
    setattr(owner, name, value)
    before.callback(setattr, owner, name, old)
    return True


def _call(
    before: ExitStack, ask: Callable[[], bool] | None, change: Callable[[bool], None] | None, value: bool
) -> None:
    if ask is None or change is None:
        return
    before.callback(change, ask())
    change(value)


def is_gtx_16(device: torch.device) -> bool:
    """Whether a device is a GTX 1630 to 1660: compute capability 7.5 without tensor cores."""
    return torch.cuda.get_device_capability(device) == (7, 5) and "GTX 16" in torch.cuda.get_device_name(device)


def native_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 itself; NVIDIA cards before the RTX 30xx emulate it, many times slower."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):
        try:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        except TypeError:  # before torch 2.4 it had no such question, and said yes on every card with CUDA 11
            return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def bf16_warning(device: torch.device, compute: torch.dtype) -> str:
    """What to know of bf16 on a card that only emulates it; "" when all is well."""
    if compute != torch.bfloat16 or native_bf16(device):
        return ""
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} has no bf16 of its own and emulates it, which is many times slower. "
        "Set train_model_precision to fp16, or to fp32 where fp16 overflows."
    )
