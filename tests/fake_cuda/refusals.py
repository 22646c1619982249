"""What a CUDA device refuses and torch's rules for sizes on `meta` tensors let pass: precisions that do not fit, places
that do not, generators of main memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "linear", "linear_backward", "_addmm_activation",
    "convolution", "_convolution", "convolution_backward", "convolution_overrideable",
    "convolution_backward_overrideable", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "index_add",
    "index_add_", "index_copy", "index_copy_", "_cdist_forward",
}  # fmt: skip
"""Take floating-point tensors of one precision."""
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
"""Take indices from main memory too; what is put has the precision of where it is put."""
_LOW_TOO = {"linalg_vector_norm", "linalg_cross", "linalg_matrix_exp"}
"""What of `torch.linalg` computes in half precision."""
_LOW = {torch.float16, torch.bfloat16}
_EIGHT_BITS = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_MOVES = {"copy_", "_to_copy", "clone", "cat", "fill_", "zero_", "_scaled_mm"}
"""Take eight-bit floats, as views and allocations do; arithmetic does not."""


@functools.cache
def name_of(func: Any) -> str:
    """The operator without namespace and overload."""
    name: str = func._schema.name.rpartition("::")[2]
    return name


def precisions(func: Any, args: Any, tensors: Iterable[Tensor], silent: bool) -> str:
    """Why the precisions of these tensors do not fit the operator, "" when they do. `silent`: it launches no kernel."""
    if silent:
        return ""
    name = name_of(func)
    if name in _INDEXED:
        tensors = [one for one in (args[0], *args[2:3]) if isinstance(one, Tensor)]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    text = ", ".join(sorted(map(str, kinds)))
    if len(kinds) > 1 and (name in _PRODUCTS or name in _INDEXED):
        return f"expected tensors of one precision, found {text}"
    if kinds & _LOW and name.startswith(("linalg_", "_linalg_")) and name not in _LOW_TOO:
        return f"there is no kernel for half precision, found {text}"
    if kinds & _EIGHT_BITS and name not in _MOVES:
        return f"there is no arithmetic in eight bits, found {text}"
    return ""


def places(func: Any, args: Any, kwargs: Any, tensors: Iterable[Tensor]) -> str:
    """Why the places of these tensors do not fit the operator, "" when they do: tensors in main memory that have
    dimensions, but for indices; a generator that draws in main memory.
    """
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        return f"expected a generator of the device, found one of {generator.device}"
    if name_of(func) in _INDEXED:
        tensors = [one for one in (args[0], *args[2:3]) if isinstance(one, Tensor)]
        if args[0].device.type == "cpu":
            return "a tensor in main memory takes no indices from the device"
    if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        return f"expected all tensors on one device, found {shapes}"
    return ""
