"""The files of settings: names that are right on every system, JSON read strictly and written whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import JobError, Problem
from ..jsontext import MOST_BYTES, JsonError, read
from ..writing import write_whole

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³")}
LARGEST_FILE = MOST_BYTES
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
    try:
        return read(Path(path), once=True)
    except JsonError as fault:
        toml = Path(path).suffix.lower() == ".toml"
        message = f"{fault}. " + (
            "Settings of kohya's scripts in TOML are not read; write them as JSON under the names used here, as"
            ' {"network_rank": 16} for network_dim.'
            if toml
            else "Correct it (JSON in UTF-8), or choose another settings file."
        )
        # The queue tells a file that cannot be opened from a damaged one by what is behind the error.
        raise JobError([Problem("file", str(path), message)]) from (fault.__cause__ or fault)


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file is either the old or the whole new one. Raises OSError."""
    write_whole(path, json_bytes(data))


def json_bytes(data: object) -> bytes:
    """JSON as it is written to a file."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a symbol, as names of files on Linux can hold: written as JSON's own escape
        return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode("ascii")
