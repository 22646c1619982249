"""Pickles read without running anything: an interpreter that knows dictionaries, lists, numbers, texts and tensors.

`pickle` imports what a file names and calls it. Here the standard library's parser (`pickletools`) takes the text of
the pickle apart, and what it names becomes an inert `Named`. Names beyond a list of harmless ones are refused, so that
a file with a program inside is reported and not half read. Time and memory are bounded by the size of the pickle.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 32 * 2**20
MOST_STEPS = 1_000_000

_EXACT = {
    "torch": r"\w+Storage|Size|device|u?int\d+|b?float\d+\w*|half|double|long|bool|complex\d+|strided|Tensor",
    "torch.storage": r"_?UntypedStorage|_?TypedStorage",
    "torch._utils": r"_rebuild_tensor(_v2|_v3)?|_rebuild_parameter(_with_state)?",
    "torch.nn.parameter": r"Parameter",
    "torch.nn.modules.container": r"ParameterDict|ParameterList",
    "torch.serialization": r"_get_layout",
    "collections": r"OrderedDict|defaultdict|Counter|deque",
    "numpy": r"dtype|ndarray|u?int\d+|float\d+",
    "numpy.core.multiarray": r"scalar|_reconstruct",
    "numpy._core.multiarray": r"scalar|_reconstruct",
    "_codecs": r"encode",
    "copyreg": r"_reconstructor",
    "copy_reg": r"_reconstructor",
    "datetime": r"datetime|date|time|timedelta|timezone",
    "pathlib": r"(Pure)?(Posix|Windows)?Path",
    "argparse": r"Namespace",
    "typing": r"Any|Dict|List|Union|Optional|Tuple",
}
"""Modules and the names in them in checkpoints: tensors, and the plain data of the programs that trained them."""
for _module in ("builtins", "__builtin__"):
    _EXACT[_module] = r"set|frozenset|list|dict|tuple|int|float|bool|str|unicode|long|bytes|object|complex|slice"
_FRAMEWORKS = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)(\.\w+)*")
"""Lightning keeps its callbacks' state beside the weights, under classes of its own, and settings as omegaconf's."""
_CLASS = re.compile(r"[A-Z]\w*")


class PickleError(ValueError):
    """A pickle that is damaged or more than is read; the text says why, as a sentence without the file's name."""


class ForeignNameError(PickleError):
    """A pickle that names something that is no part of a checkpoint."""


@dataclass(frozen=True)
class Named:
    """A class or function by its name; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Made:
    """What a pickle would have made with something it names, as the name and the arguments."""

    kind: object
    given: object


class _Mark:
    pass


_MARK = _Mark()
_KEYS = (str, int, float, bytes, type(None), Named)
"""What may be a key: hashing nested tuples could take for ever, and no weight is called so."""


class Unpickler:
    """Reads pickles that follow one another in `content`. `storage` is called for each persistent id."""

    def __init__(self, content: bytes, storage: Callable[[Any], object] | None = None) -> None:
        self.file = io.BytesIO(content)
        self._storage = storage
        self._steps = 0

    def load(self) -> Any:
        """The next object. Raises PickleError."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for op, given, _ in pickletools.genops(self.file):
                self._steps += 1
                if self._steps > MOST_STEPS:
                    raise PickleError(f"its pickle has more than {MOST_STEPS:,} instructions")
                if op.name == "STOP":
                    return self._stack.pop()
                step = _STEPS.get(op.name)
                if step is None:
                    raise PickleError(f"its pickle has the instruction {op.name}, which torch.save does not write")
                step(self, given)
        except PickleError:
            raise
        except (ValueError, LookupError, TypeError, OverflowError, AttributeError) as fault:
            raise PickleError(f"its pickle is damaged ({fault})") from fault
        raise PickleError("its pickle is cut off")

    # ---------------------------------------------------------------- the stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _to_mark(self) -> list[Any]:
        at = next(place for place in range(len(self._stack) - 1, -1, -1) if self._stack[place] is _MARK)
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _pop_mark(self) -> list[Any]:
        try:
            return self._to_mark()
        except StopIteration:
            raise PickleError("its pickle is damaged (a mark is missing)") from None

    def _pop(self, count: int = 1) -> list[Any]:
        if len(self._stack) < count:
            raise PickleError("its pickle is damaged (its stack is empty)")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _name(self, module: str, name: str) -> None:
        if not harmless(module, name):
            raise ForeignNameError(f"it names {module[:80]}.{name[:80]}, which is no part of a checkpoint")
        self._push(Named(module, name))

    # ---------------------------------------------------------------- containers

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update({key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True)
                           if isinstance(key, _KEYS)})  # fmt: skip

    def _add(self, values: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(values)

    def _call(self) -> None:
        kind, given = self._pop(2)
        if not isinstance(kind, Named):
            raise PickleError("its pickle is damaged (something that is no class is called)")
        if kind.module == "collections" and kind.name in ("OrderedDict", "defaultdict"):
            self._push({})
            pairs = given[0] if kind.name == "OrderedDict" and isinstance(given, tuple) and given else ()
            pairs = pairs if isinstance(pairs, (list, tuple)) else ()
            self._steps += len(pairs)  # one list can be named again and again
            self._set([part for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2 for part in pair])
            return
        self._push(Made(kind, given))

    def _persistent(self) -> None:
        (given,) = self._pop()
        self._push(self._storage(given) if self._storage else Made(None, given))


def harmless(module: str, name: str) -> bool:
    """Whether a checkpoint may name this: a part of a tensor, or plain data of what trained it."""
    known = _EXACT.get(module)
    if known is not None:
        return re.fullmatch(known, name) is not None
    return bool(_FRAMEWORKS.fullmatch(module) and _CLASS.fullmatch(name))


def _group(count: int) -> Callable[[Unpickler, Any], None]:
    return lambda self, _: self._push(tuple(self._pop(count)))


def _stack_global(self: Unpickler, _: Any) -> None:
    module, name = self._pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("its pickle is damaged (a name is no text)")
    self._name(module, name)


def _global(self: Unpickler, given: str) -> None:
    module, _, name = given.partition(" ")  # both come in one text; neither has a blank in a name that is allowed
    self._name(module, name)


def _dict(self: Unpickler, _: Any) -> None:
    pairs = self._pop_mark()
    self._push({})
    self._set(pairs)


def _set_item(self: Unpickler, _: Any) -> None:
    self._set(self._pop(2))


def _append(self: Unpickler, _: Any) -> None:
    self._add(self._pop())


def _new(self: Unpickler, _: Any) -> None:
    self._call()


def _new_extended(self: Unpickler, _: Any) -> None:
    self._pop()
    self._call()


def _nothing(self: Unpickler, _: Any) -> None:
    return


def _given(self: Unpickler, given: Any) -> None:
    self._push(given)


def _drop(self: Unpickler, _: Any) -> None:
    self._pop()


def _drop_to_mark(self: Unpickler, _: Any) -> None:
    self._pop_mark()


_STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
         "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _given),
    "MARK": lambda self, _: self._push(_MARK),
    "POP": _drop,
    "POP_MARK": _drop_to_mark,
    "DUP": lambda self, _: self._push(self._stack[-1]),
    "NONE": lambda self, _: self._push(None),
    "NEWTRUE": lambda self, _: self._push(True),
    "NEWFALSE": lambda self, _: self._push(False),
    "EMPTY_DICT": lambda self, _: self._push({}),
    "EMPTY_LIST": lambda self, _: self._push([]),
    "EMPTY_SET": lambda self, _: self._push([]),
    "EMPTY_TUPLE": lambda self, _: self._push(()),
    "DICT": _dict,
    "LIST": lambda self, _: self._push(self._pop_mark()),
    "FROZENSET": lambda self, _: self._push(self._pop_mark()),
    "TUPLE": lambda self, _: self._push(tuple(self._pop_mark())),
    "TUPLE1": _group(1), "TUPLE2": _group(2), "TUPLE3": _group(3),
    "APPEND": _append,
    "APPENDS": lambda self, _: self._add(self._pop_mark()),
    "ADDITEMS": lambda self, _: self._add(self._pop_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda self, _: self._set(self._pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda self, given: self._remember(given)),
    "MEMOIZE": lambda self, _: self._remember(len(self._memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, given: self._push(self._memo[given])),
    "GLOBAL": _global, "STACK_GLOBAL": _stack_global,
    "BINPERSID": lambda self, _: self._persistent(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _new),
    "NEWOBJ_EX": _new_extended,
    "BUILD": _drop,  # the state of something inert
}  # fmt: skip
