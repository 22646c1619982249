"""Lines of `sample_prompts`: a prompt, and what kohya's scripts let follow it: `a cat --n blurry --w 640 --d 7`."""

from __future__ import annotations

import re
from dataclasses import dataclass

KNOWN = "--n negative prompt, --w width, --h height, --s steps, --d seed, --l CFG scale"
SIDES, STEPS, SCALES = (32, 4096), (1, 1000), (0.0, 100.0)
_FILES = (".txt", ".json", ".toml")


@dataclass(frozen=True)
class Preview:
    """One preview image. Sides in pixels; None takes what the job says."""

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    cfg: float | None = None


def parse_previews(text: str) -> tuple[Preview, ...]:
    """The previews of a text, one per line that is not empty. Raises ValueError naming everything that is wrong."""
    found, faults = [], []
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        try:
            found.append(_parse(line))
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise ValueError(" ".join(faults))
    return tuple(found)


def _parse(line: str) -> Preview:
    if line.lower().endswith(_FILES) and " " not in line:
        raise ValueError(f"{line!r} is the name of a file; write the prompts themselves, one per line.")
    prompt, *flags = re.split(r"(?:^|\s)--(?=\w)", line)
    values: dict[str, object] = {}
    for flag in flags:
        name, _, value = flag.partition(" ")
        field, given = _value(name.lower(), value.strip(), line)
        if field in values:
            raise ValueError(f"{line[:40]!r} has --{name} twice; keep one.")
        values[field] = given
    return Preview(prompt.strip(), **values)  # type: ignore[arg-type]


def _value(name: str, value: str, line: str) -> tuple[str, object]:
    if name == "n":
        return "negative", value
    whole = {"w": ("width", SIDES), "h": ("height", SIDES), "s": ("steps", STEPS), "d": ("seed", (0, 2**63 - 1))}
    if name not in {*whole, "l"}:
        raise ValueError(f"--{name} in {line[:40]!r} is not known; known are {KNOWN}.")
    if name == "l":
        number = float(value) if re.fullmatch(r"\d+\.?\d*|\.\d+", value, re.ASCII) else -1.0
        if not SCALES[0] <= number <= SCALES[1]:
            raise ValueError(f"--l {value} must be a number from 0 to 100.")
        return "cfg", number
    field, (low, high) = whole[name]
    given = int(value) if re.fullmatch(r"\d{1,19}", value, re.ASCII) else -1
    if not low <= given <= high:
        raise ValueError(f"--{name} {value} must be a whole number from {low} to {high}.")
    if field in ("width", "height") and given % 8:
        raise ValueError(f"--{name} {value} must be a multiple of 8; write {given // 8 * 8}.")
    return field, given
