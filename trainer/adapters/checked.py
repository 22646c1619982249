"""Tensors of files that others wrote, looked at before anything is made of them: numbers, finite, of a form their name
asks for. What fits a layer is the layer's to say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError, brief

NUMBERS = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip
SINGLE = ("alpha", "on_input")
MOST_AXES = 4
LARGEST_ALPHA = 1e12

_LEAST_AXES = {
    "lora_down.weight": 2, "lora_up.weight": 2, "lora_mid.weight": 4, "dora_scale": 1, "ia3_l": 1, "weight": 1,
    "hada_w1_a": 2, "hada_w1_b": 2, "hada_w2_a": 2, "hada_w2_b": 2, "hada_t1": 4, "hada_t2": 4,
    "lokr_w1": 2, "lokr_w1_a": 2, "lokr_w1_b": 2, "lokr_w2": 2, "lokr_w2_a": 2, "lokr_w2_b": 2, "lokr_t2": 4,
    "a1.weight": 2, "a2.weight": 2, "b1.weight": 2, "b2.weight": 2, "linear.weight": 2,
    "oft_blocks": 3, "diff": 1, "diff_b": 1, "w_norm": 1, "b_norm": 1,
}  # fmt: skip
"""The least number of axes by the end of a tensor's name; the longest end that fits counts."""


def check_numbers(tensors: Mapping[str, Tensor], file: str) -> None:
    """Raise AdapterError for the first tensor that is not numbers, or has some that are not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"{file}: {brief(name)} is stored as {kind}, which is not read. Choose an fp16 file.")
        if tensor.is_floating_point() and not bool(_wide(tensor).isfinite().all()):
            raise AdapterError(
                f"{file}: {brief(name)} has numbers that are not finite (NaN or infinite): what made this file went"
                " wrong, and nothing can be built on it. Choose another file."
            )


def check_forms(tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for the first tensor of a LoRA that has another form than its name says. Names are ours."""
    for name, tensor in tensors.items():
        if name.endswith(tuple(f".{end}" for end in SINGLE)):
            if tensor.numel() != 1 or not abs(float(tensor)) <= LARGEST_ALPHA:
                raise _form(name, tensor, "one number is right")
            continue
        least = _least(name)
        if least and not (least <= tensor.ndim <= MOST_AXES and tensor.numel()):
            raise _form(name, tensor, f"{least} or more axes with numbers in them are right")


def single(tensor: Tensor) -> float:
    """The one number of a tensor that `check_forms` has passed."""
    return float(tensor.reshape(()))


def taken(tensors: Mapping[str, Tensor], name: str, axes: int, file: str) -> Tensor:
    """A tensor of a file by name, float32. Raises AdapterError when it is absent or has not that many axes."""
    found = tensors.get(name)
    if found is None or found.ndim != axes or not found.numel():
        form = "is missing" if found is None else f"has the shape {list(found.shape)}"
        raise AdapterError(f"{file}: {brief(name)} {form}, and {axes} axes are needed. Make the file again.")
    return found.float()


def _least(name: str) -> int:
    parts = name.split(".")
    return next((_LEAST_AXES[end] for end in (".".join(parts[-2:]), parts[-1]) if end in _LEAST_AXES), 0)


def _form(name: str, tensor: Tensor, right: str) -> AdapterError:
    shape = f"is {brief(tensor.item())}" if tensor.numel() == 1 else f"has the shape {list(tensor.shape)}"
    return AdapterError(f"The LoRA file is damaged: {brief(name)} {shape}, and {right}. Get the file again.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 1 else tensor
