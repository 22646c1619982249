"""JSON that others wrote: parsed with limits on its size, its depth and its numbers, whatever program reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from .writing import why

MOST_BYTES = 16 * 1024 * 1024
MOST_PARTS = 1_000_000
MOST_GROUPS = 200_000
DEEPEST = 100
LONGEST_NUMBER = 400
"""Characters of a number; more than this is no setting, and converting it takes long."""


class JsonError(ValueError):
    """A text that is not JSON, or more than is read; the message says what is wrong and where, not in which file."""


def parse(text: str | bytes, *, once: bool = False) -> object:
    """What a JSON text holds; bytes are UTF-8, with or without its mark. `once` refuses a key that is given twice.

    Raises JsonError, and nothing else, also for NaN and Infinity, which JSON does not have.
    """
    if len(text) > MOST_BYTES:
        raise JsonError(f"is larger than the {MOST_BYTES // 2**20} MiB that are read")
    try:
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as fault:
        raise JsonError("is not text in UTF-8") from fault
    # Counted before anything is made of it: millions of empty lists take a hundred times the room of their text.
    if plain.count("[") + plain.count("{") > MOST_GROUPS or plain.count(",") > MOST_PARTS:
        raise JsonError(f"has more parts than the {MOST_PARTS:,} that are read")
    pairs = _once if once else None
    try:
        found = json.loads(
            plain, object_pairs_hook=pairs, parse_constant=_no_constant, parse_int=_whole, parse_float=_real
        )
    except json.JSONDecodeError as fault:
        raise JsonError(f"is not JSON: {fault.msg} in line {fault.lineno}, column {fault.colno}") from fault
    except RecursionError as fault:
        raise JsonError(f"is nested too deep (more than {DEEPEST} levels)") from fault
    if _deeper(found, DEEPEST):
        raise JsonError(f"is nested too deep (more than {DEEPEST} levels)")
    return found


def read(path: Path, *, once: bool = False) -> object:
    """What a JSON file holds. Raises JsonError, also when it cannot be read."""
    return parse(read_bytes(path, MOST_BYTES), once=once)


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises JsonError, also when it holds something else."""
    found = read(path)
    if not isinstance(found, dict):
        raise JsonError("holds no JSON object")
    return found


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a small file. Raises JsonError when it cannot be read or has more than `most`."""
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as fault:
        raise JsonError(f"cannot be read: {why(fault)}") from fault
    if len(content) > most:
        raise JsonError(f"is larger than the {most // 2**20} MiB that are read")
    return content


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`; without recursion."""
    row = [value]
    for _ in range(levels + 1):
        row = [part for held in row for part in _parts(held)]
        if not row:
            return False
    return True


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        value = list(value.values())
    return [part for part in value if isinstance(part, (dict, list))] if isinstance(value, list) else []


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise JsonError(f"holds a number that is too long ({len(digits)} digits)")
    return int(digits)


def _real(digits: str) -> float:
    if len(digits) > LONGEST_NUMBER:
        raise JsonError(f"holds a number that is too long ({len(digits)} digits)")
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError(f"holds {digits[:20]}, which is larger than any number that can be held")
    return number


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    held = dict(pairs)
    if len(held) < len(pairs):
        seen: set[str] = set()
        twice = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        raise JsonError(f"gives {', '.join(map(repr, twice[:5]))} more than once; keep one")
    return held


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"holds {name}, which is not a number; write a number")
