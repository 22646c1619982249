"""How much memory a training step takes: predicted by running it on fake tensors, which have sizes but no data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..jsontext import JsonError, read_bytes
from ..writing import write_whole


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages created on a device inside the block and still alive; `peak` is the maximum."""

    def __init__(self, device: torch.device | None = None, there: Iterable[Tensor] = ()) -> None:
        """`device`: None counts all of them. `there`: what was there before; views of it create nothing."""
        super().__init__()
        self._kind = None if device is None else device.type
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in there}

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if not isinstance(value, Tensor) or self._kind not in (None, value.device.type):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._seen:
                continue
            size = storage.nbytes()
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, size)
        return out


class _Step(nn.Module):
    """Some work, and the backward pass of its result, as a module: `functional_call` can put fake tensors in the place
    of its weights. Both in one, for what is recomputed in the backward pass needs the weights again.
    """

    def __init__(self, modules: Iterable[nn.Module], work: Callable[[], Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._work = work

    def forward(self) -> None:
        """Work with whatever weights the parts have at the moment."""
        value = self._work().sum()
        if value.requires_grad:
            value.backward()


def step_bytes(modules: Sequence[nn.Module], work: Callable[[], Tensor], device: torch.device | None = None) -> int:
    """Peak bytes that `work`, and the backward pass of its result where it has one, allocate beyond the weights of
    `modules` and the gradients of those that are trained.

    It is called with fake tensors on `device` (None: where they are) in the place of all parameters and buffers of the
    modules, and must make its inputs itself.
    """
    step = _Step(modules, work)
    named = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty = {name: _empty_like(tensor, device) for name, tensor in named.items()}
        gradients = [tensor.grad for tensor in empty.values() if tensor.grad is not None]
        with LiveBytes(device, [*empty.values(), *gradients]) as counter:
            # A module that several others hold would be swapped once for each, and get a fake tensor back at the end.
            torch.func.functional_call(step, empty, tie_weights=False)
    return counter.peak


def _empty_like(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Inside a fake mode: a fake tensor of the same sizes, with its gradient where it has one. Five times as fast as
    having the mode convert it.
    """
    place = tensor.device if device is None else device
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
    if tensor.requires_grad:
        made.requires_grad_()
        made.grad = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
    return made


def module_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the distinct storages behind parameters and buffers."""
    sizes: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def remembered(folder: Path, facts: Mapping[str, object], work: Callable[[], int]) -> int:
    """The number that `work` gives for these facts, kept in a small file per set of facts; `work` is done once."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = folder / f"memory-{name}.txt"
    kept = _kept(path)
    if kept is not None:
        return kept
    value = work()
    with contextlib.suppress(OSError):  # then it is counted anew the next time
        write_whole(path, str(value).encode("ascii"))
    return value


def _kept(path: Path) -> int | None:
    """The number of bytes in a small file; None when it is not there or damaged: then it is worked out anew."""
    try:
        text = read_bytes(path, 64).decode("ascii").strip()
    except (JsonError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() and len(text) < 19 else None


def layout(modules: Iterable[nn.Module]) -> str:
    """A hash of names, shapes, dtypes and trainability of all parameters: equal layouts need equal memory."""
    digest = hashlib.sha256()
    for module in modules:
        for name, p in module.named_parameters():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
    return digest.hexdigest()
