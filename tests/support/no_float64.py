"""A device without float64 (Apple's) made of the CPU: whatever reaches it in float64 is refused, as MPS does it.

`refusing()` switches it on; `DEVICE` is then that device for everything below: tensors moved to it, made on it or
computed from some on it are known by their storage, in forward and backward passes too. The arithmetic is the CPU's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.maths import precise

DEVICE = torch.device("cpu:0")  # no tensor of the CPU ever says so of itself: every move to it is seen
HOST = torch.device("cpu")
WIDE = (torch.float64, torch.complex128)
DEVICE_OF = Tensor.device.__get__
aten = torch.ops.aten


class Marks:
    """The storages that are on the device."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        self.seen = 0

    def __contains__(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            found = self._held.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def add(self, tensor: Tensor, what: Any) -> None:
        """Put a tensor on the device. Raises TypeError as MPS does."""
        with torch._C.DisableTorchFunction():
            if tensor.dtype in WIDE:
                raise TypeError(f"{what}: cannot make a tensor of float64 on the device, which has none of it")
            storage = tensor.untyped_storage()
            self.seen += 1
            if storage._cdata not in self._held or self._held[storage._cdata].expired():
                self._held[storage._cdata] = StorageWeakRef(storage)
        if len(self._held) > 50_000:
            self._held = {key: held for key, held in self._held.items() if not held.expired()}

    def drop(self, tensor: Tensor) -> Tensor:
        """Take a tensor that has its storage for itself back to the host."""
        with torch._C.DisableTorchFunction():
            self._held.pop(tensor.untyped_storage()._cdata, None)
        return tensor


class Operations(TorchDispatchMode):
    """Follows the device through every operation, those of the backward pass included."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten.copy_.default:  # where it is written to says where it is
            return out
        place = kwargs.get("device")
        if place is None:
            on = any(isinstance(x, Tensor) and x in self.marks for x in tree_leaves((args, kwargs)))
        else:
            on = place == DEVICE
        if on:
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self.marks.add(made, func)
        return out


class Names(TorchFunctionMode):
    """What Python says of the device: `tensor.device`, moves to and from it, tensors made of numbers."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == DEVICE_OF:
            return DEVICE if args[0] in self.marks else func(*args)
        if func is Tensor.cpu:
            return self._home(args[0])
        if func is Tensor.to:
            return self._moved(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in self.marks:
            raise TypeError("can't convert a tensor of the device to numpy; use .cpu() first")
        made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _device(kwargs.get("device")) == DEVICE:
            self.marks.add(made, func)
        return made

    def _home(self, tensor: Tensor) -> Tensor:
        return self.marks.drop(tensor.clone()) if tensor in self.marks else tensor

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        place, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        other = kwargs.pop("other", None)
        for value in given:
            if isinstance(value, Tensor):
                other = value
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (torch.device, str)):
                place = value
        if other is not None:
            place, dtype = (DEVICE if other in self.marks else HOST), other.dtype
        if place is not None and _device(place) != DEVICE:
            tensor = self._home(tensor)
        elif place is not None and tensor not in self.marks:
            return tensor.to(DEVICE, dtype) if dtype else tensor.to(DEVICE)
        return tensor.to(dtype, **kwargs) if dtype else tensor


def _device(place: Any) -> torch.device | None:
    return None if place is None else torch.device(place)


@contextlib.contextmanager
def refusing() -> Iterator[Marks]:
    """Inside the block `DEVICE` takes no float64, and the product knows it as it knows it of MPS."""
    marks, known = Marks(), precise.has_float64
    precise.has_float64 = lambda device: device != DEVICE and known(device)
    try:
        with Operations(marks), Names(marks):
            yield marks
    finally:
        precise.has_float64 = known
