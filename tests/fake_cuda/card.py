"""A CUDA device without numbers: a tensor on it has sizes, a precision and a place; one in main memory is real.

`Card` is a dispatch mode. What concerns main memory alone is computed as ever. What touches the device runs torch's own
rules for sizes and precisions on `meta` tensors and is counted; what a CUDA device refuses raises. Nothing can be read
from the device: what is asked of it is noted with the place in the code that asked, and answered with ones, so that "is
it finite?" is answered well.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import refusals

ATEN: Any = torch.ops.aten
DEVICE, META = torch.device("cuda", 0), torch.device("meta")
FEW = 2**20
"""Tensors of up to so many numbers arrive in main memory as ones."""
_READS = {ATEN._local_scalar_dense.default, ATEN.is_nonzero.default, ATEN.equal.default}
_COPY, _TO = ATEN.copy_.default, ATEN._to_copy.default
_NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "alias", "lift",
    "lift_fresh", "_reshape_alias", "_unsafe_view", "set_", "resize_", "is_same_size", "_efficientzerotensor",
}  # fmt: skip


class OnCard(Tensor):
    """A tensor on the card; `meta` has its sizes and its storage. `home`: a parameter whose data was set to a tensor in
    main memory stands for that one (a parameter cannot change its class).
    """

    meta: Tensor
    home: Tensor | None

    @staticmethod
    def of(meta: Tensor) -> OnCard:
        """The tensor on the card with these sizes."""
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            OnCard, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=DEVICE
        )
        made.meta, made.home = meta, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the card, which is no longer in")

    def untyped_storage(self) -> Any:
        """The storage whose bytes are counted."""
        return self.meta.untyped_storage()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it is."""
        return DEVICE if self.home is None else self.home.device

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Itself without its history; setting it changes sizes, storage and place."""
        return torch._C.TensorBase.data.__get__(self) if self.home is None else self.home

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, OnCard):
            torch._C.TensorBase.data.__set__(self, value)
            self.meta, self.home = value.meta, value.home
        else:
            nothing = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
            torch._C.TensorBase.data.__set__(self, OnCard.of(nothing))
            self.meta, self.home = nothing, value


@dataclass
class Counts:
    """What happened on the card in one phase: operators that launch a kernel, by name; copies to it and readings of it,
    by the place in the code that asked; the most bytes of tensors that were on it.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    peak: int = 0


class Card(TorchDispatchMode):
    """See the module. `counts` are of the present phase, `live` are the bytes in use now, `peak` the most of them since
    the program asked to forget it. `room`: the bytes that fit; more is refused as CUDA's allocator does.
    """

    def __init__(self, room: int | None = None) -> None:
        super().__init__()
        self.room = room
        self.counts = Counts()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._remembered: dict[Any, Any] = {}

    @contextlib.contextmanager
    def phase(self) -> Iterator[Counts]:
        """Count what happens inside the block in what is given, not in the phase around it; the peak in both."""
        around, self.counts = self.counts, Counts(peak=self.live)
        try:
            yield self.counts
        finally:
            around.peak = max(around.peak, self.counts.peak)
            self.counts = around

    # ---------------------------------------------------------------------------------------------- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs))
        on_card = [tensor for tensor in tensors if type(tensor) is OnCard and tensor.home is None]
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            wanted = DEVICE
        if not on_card and wanted != DEVICE:
            return self._in_memory(func, args, kwargs, tensors)
        if func in _READS:
            return self._read(func, on_card[0])
        if func is _COPY:
            if args[0] is not on_card[0]:
                return self._back(args[1], args[0].dtype, into=args[0])
            if len(on_card) < 2:
                self.counts.writes[_place()] += 1
        elif func is _TO:
            if wanted is not None and wanted != DEVICE:
                return self._back(args[0], kwargs.get("dtype") or args[0].dtype)
            if not on_card:
                self.counts.writes[_place()] += 1
        else:
            self._check(func, args, kwargs, tensors)
        return self._on_card(func, args, kwargs, wanted)

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Raise RuntimeError when a CUDA device refuses an operator; indices from main memory are copied to it."""
        wrong = refusals.places(func, args, kwargs, tensors) or (
            refusals.precisions(func, args, tensors, silent=_is_silent(func))
        )
        if wrong:
            raise RuntimeError(f"{func.name()} at {_place()}: {wrong}")
        aside = sum(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors)
        if aside:
            self.counts.writes[_place()] += aside

    def _on_card(self, func: Any, args: Any, kwargs: Any, wanted: Any) -> Any:
        known: dict[int, Tensor] = {}
        inner = _as_meta(args, known)
        words = {name: _as_meta(value, known) if name != "device" else META for name, value in kwargs.items()}
        if wanted is not None:
            words.pop("pin_memory", None)
        try:
            out = self._rules(func, inner, words)
        except NotImplementedError as error:
            self.counts.reads[_place()] += 1
            raise RuntimeError(f"{func.name()} at {_place()} must read the device to know its result") from error
        if not _is_silent(func):
            self.counts.kernels[refusals.name_of(func)] += 1
        return self._as_ours(out, known)

    def _rules(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What torch's rules on `meta` give. Many of them are slow: what was asked before is remembered."""
        if _is_silent(func):
            return func(*args, **kwargs)
        try:
            key = (func, _facts_of(args), tuple((name, _facts_of(value)) for name, value in kwargs.items()))
            made = self._remembered.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if made is None:
            out = func(*args, **kwargs)
            if not func._schema.is_mutable or (args and out is args[0]):
                self._remembered[key] = _recipe(out, args)
            return out
        return made(args)

    def _as_ours(self, value: Any, known: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            given = known.get(id(value))
            if given is not None:
                return given
            self._hold(value)
            return OnCard.of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._as_ours(item, known) for item in value)
        return value

    def _in_memory(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Compute in main memory. A parameter that came back from the card is its home."""
        if any(type(tensor) is OnCard for tensor in tensors):
            known: dict[int, Tensor] = {}
            out = func(*_at_home(args, known), **{name: _at_home(value, known) for name, value in kwargs.items()})
            return known.get(id(out), out)
        return func(*args, **kwargs)

    def _back(self, source: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Copy into main memory. Ones arrive, or, where they are many, zeros, which take no memory until they are
        written.
        """
        self.counts.reads[_place()] += 1
        if source.dtype == torch.bool or source.numel() <= FEW:
            made = torch.ones(source.shape, dtype=dtype)
        else:
            kind = _AS_NUMPY.get(dtype) or torch.zeros((), dtype=dtype).numpy().dtype
            made = torch.from_numpy(np.zeros(tuple(source.shape), kind)).view(dtype)
        if into is None:
            return made
        (into.home if type(into) is OnCard and into.home is not None else into).copy_(made)
        return into

    def _read(self, func: Any, tensor: Tensor) -> Any:
        """A number or an answer asked of the card."""
        self.counts.reads[_place()] += 1
        if func is not ATEN._local_scalar_dense.default or tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1

    # ------------------------------------------------------------------------------------------------- bytes

    def _hold(self, meta: Tensor) -> None:
        storage = meta.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        if self.room is not None and self.live + size > self.room:
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.room / 2**30:.2f} GiB of which {(self.room - self.live) / 2**20:.2f} MiB is free."
            )
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.counts.peak = max(self.counts.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


_AS_NUMPY = {torch.bfloat16: np.int16, torch.float8_e4m3fn: np.int8, torch.float8_e5m2: np.int8}


@functools.cache
def _is_silent(func: Any) -> bool:
    """Whether an operator launches no kernel: it gives another view, or memory as it is."""
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
    return views or refusals.name_of(func) in _NO_KERNEL


def _facts_of(value: Any) -> Any:
    """All that the rules know of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(map(_facts_of, value))
    return type(value), value


def _recipe(out: Any, args: Any) -> Callable[[Any], Any]:
    """How to make the same again: memory of the same sizes, or the argument that was changed in place."""
    if isinstance(out, Tensor):
        if args and out is args[0]:
            return operator.itemgetter(0)
        facts = tuple(out.shape), out.stride(), out.dtype
        return lambda again: torch.empty_strided(facts[0], facts[1], dtype=facts[2], device=META)
    if isinstance(out, (list, tuple)):
        kind, recipes = type(out), [_recipe(item, ()) for item in out]
        return lambda again: kind(make(()) for make in recipes)
    return lambda again: out


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator, which holds them itself or in lists."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def _as_meta(value: Any, known: dict[int, Tensor]) -> Any:
    """Arguments as the rules for sizes take them; `known` gets what stands for which tensor."""
    if type(value) is OnCard and value.home is None:
        known[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor):
        found = value.home if type(value) is OnCard else value
        if not found.dim():  # a number beside the tensors of an operator
            return found
        return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_meta(item, known) for item in value)
    return value


def _at_home(value: Any, known: dict[int, Tensor]) -> Any:
    if type(value) is OnCard and value.home is not None:
        known[id(value.home)] = value
        return value.home
    if isinstance(value, (list, tuple)):
        return type(value)(_at_home(item, known) for item in value)
    return value


_LIBRARIES = ("pytorch_optimizer/", "transformers/", "diffusers/", "torch/optim/")


def _place() -> str:
    """The innermost function of ours or of a library that is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        _, installed, name = path.rpartition("/site-packages/")
        if installed and name.startswith(_LIBRARIES):
            return f"{name}:{frame.f_code.co_qualname}"
        if not installed and "/trainer/" in path:
            return f"{path.rpartition('/trainer/')[2]}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "backward"


# ------------------------------------------------------------------------------------------------ what torch is told


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` where a tensor's class depends on its place: torch's own would set `data` of parameters."""
    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    before = parameter.data if type(parameter) is OnCard and parameter.home is not None else parameter
                    made = fn(before)
                if made is not before:
                    module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


def _facts(card: Card, total: int) -> dict[str, Any]:
    """What `torch.cuda` says of the card: one that computes bf16, with `total` bytes."""

    def forget(device: Any = None) -> None:
        card.peak = card.live

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: "fake card",
        "get_device_capability": lambda device=None: (8, 6),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (total - card.live, total),
        "memory_allocated": lambda device=None: card.live,
        "memory_reserved": lambda device=None: card.live,
        "max_memory_allocated": lambda device=None: card.peak,
        "reset_peak_memory_stats": forget,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }


@contextlib.contextmanager
def inserted(room: int | None = None, total: int = 24 * 2**30) -> Iterator[Card]:
    """A card is in this machine inside the block. `room`: the bytes of tensors that it takes, None for any number."""
    from torch.optim import optimizer

    card = Card(room)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_facts(card, room or total)))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        # torch's optimizers take their fast ways for the types of tensors that they know.
        optimizer._foreach_supported_types.append(OnCard)
        stack.callback(optimizer._foreach_supported_types.remove, OnCard)
        # Tensors made from lists come to the device as a copy that the mode sees.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(card)
        yield card
