"""float64 where the device has it: Apple's and several others have none, and raise when a tensor of it arrives."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device may be float64. Only CPU and CUDA are known to take it everywhere."""
    return device.type in ("cpu", "cuda")


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU where its device has none. Results go back by `.to(tensor)`."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()
