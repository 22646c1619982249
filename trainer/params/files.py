"""The files of settings: names that are right on every system, JSON read strictly and written whole."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NoReturn

from ..errors import JobError, Problem
from ..writing import write_whole

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³")}
LARGEST_FILE = 16 * 1024 * 1024
LONGEST = 180
"""Bytes of a name, so that an ending and a step number still fit into the 255 that file systems allow."""


def name_problem(name: str) -> str:
    """Why `name` cannot be the name of a file on Windows, Linux or macOS, as a sentence; "" when it can."""
    found = FORBIDDEN.search(name)
    if found:
        kind = "a path or drive" if found.group() in "/\\:" else "a character no file name may hold"
        return f"holds {found.group()!r} ({kind}); give a plain name, without folder."
    if not name.strip() or set(name) == {"."}:
        return "is empty; give a name with letters or digits."
    if name != name.strip() or name.endswith("."):
        return f"begins or ends with a space or a dot, which Windows drops; write {name.strip().rstrip('. ')!r}."
    if name.split(".")[0].strip().lower() in RESERVED:
        return "is a name Windows keeps for a device; give another one."
    if len(name.encode()) > LONGEST:
        return f"is too long ({len(name.encode())} bytes); {LONGEST} is the most."
    return ""


def read_json(path: Path | str) -> object:
    """What a JSON file holds. Raises JobError when it cannot be read or is not JSON; no key may be repeated."""
    shown = str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise JobError([Problem("file", shown, f"cannot be read: {reason}. Check the name and the folder.")]) from fault
    if len(content) > LARGEST_FILE:
        raise JobError([Problem("file", shown, "is larger than 16 MiB; choose a settings file.")])
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as fault:
        message = f"is not JSON: {fault.msg} in line {fault.lineno}, column {fault.colno}. Correct it there."
        raise JobError([Problem("file", shown, message)]) from fault
    except UnicodeDecodeError as fault:
        raise JobError([Problem("file", shown, "is not text in UTF-8; save it as UTF-8.")]) from fault
    except (ValueError, RecursionError) as fault:
        message = str(fault) if isinstance(fault, _StrictError) else "holds a number too long or is nested too deep."
        raise JobError([Problem("file", shown, message)]) from fault


class _StrictError(ValueError):
    """Something JSON parsers let pass that we do not."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise _StrictError(f"gives {', '.join(map(repr, twice))} more than once; keep one.")
    return held


def _no_constant(name: str) -> NoReturn:
    raise _StrictError(f"holds {name}, which is not a number; write a number.")


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file is either the old or the whole new one. Raises OSError."""
    write_whole(path, json_bytes(data))


def json_bytes(data: object) -> bytes:
    """JSON as it is written to a file."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
