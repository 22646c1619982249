"""From what stands in a file or a form to a typed value, or a sentence saying what would be right."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence

from ..errors import brief
from .catalogue import Catalogue
from .table import Parameter

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,100}", re.ASCII)
WIDE = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: 0x20, 0x3001: 0x2C}
"""Full-width characters, as Japanese keyboards write them, to their plain ones."""

TRUE, FALSE = ("true", "1"), ("false", "0")
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class BadValueError(ValueError):
    """A value that cannot be used; its text says what would be right."""


def is_unset(parameter: Parameter, raw: object, choices: Sequence[str]) -> bool:
    """Whether a value stands for "not given": null, an empty text, and TrainTrain's "None" unless that is a choice."""
    if raw is None or raw == "":
        return True
    return isinstance(raw, str) and raw == "None" and "none" not in {choice.lower() for choice in choices}


def coerce(parameter: Parameter, raw: object, catalogue: Catalogue) -> object:
    """The typed value of `raw`. Raises BadValueError."""
    choices = catalogue.choices_of(parameter)
    if is_unset(parameter, raw, choices):
        return parameter.default
    if parameter.kind == "bool":
        return _truth(raw)
    if parameter.kind == "int":
        return _in_range(parameter, _whole(parameter, raw))
    if parameter.kind == "float":
        return _in_range(parameter, _number(parameter, raw))
    if parameter.kind == "size":
        return _size(parameter, raw)
    if parameter.kind == "list":
        return _names(parameter, raw, choices, catalogue.aliases_of(parameter))
    text = _text(raw)
    return choose(text, choices, catalogue.aliases_of(parameter)) if choices else text


def expectation(parameter: Parameter, choices: Sequence[str] = ()) -> str:
    """What is right for a parameter, as the end of "must be …"."""
    if parameter.kind == "bool":
        return "true or false"
    if parameter.kind == "list":
        return f"a list of names from: {', '.join(choices)}" if choices else "a list of names"
    if parameter.kind == "text":
        return f"one of: {', '.join(choices)}" if choices else "a text"
    spec, unit = parameter.spec, f" {parameter.spec.unit}" if parameter.spec.unit else ""
    text = {
        "int": "a whole number", "float": "a number", "size": "one whole number or height,width, each",
    }[parameter.kind]  # fmt: skip
    if spec.low is not None and spec.high is not None and spec.high < 1e15:
        text += f" from {shown(spec.low)} to {shown(spec.high)}{unit}"
    elif spec.low is not None:
        text += f" of at least {shown(spec.low)}{unit}"
    elif spec.high is not None and spec.high < 1e15:
        text += f" of at most {shown(spec.high)}{unit}"
    return text + (f", a multiple of {spec.multiple}" if spec.multiple else "")


def shown(value: object) -> str:
    """A default or bound as it is written in a file."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        return str(value[0])
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


def default_text(parameter: Parameter, choices: Sequence[str] = ()) -> str:
    """The default of a parameter as a reader understands it."""
    if choices and parameter.default == tuple(choices):
        return "all"
    return shown(parameter.default) if parameter.default not in (None, "", ()) else "empty"


def choose(text: str, choices: Sequence[str], aliases: Mapping[str, str]) -> str:
    """The spelling used here of one of `choices`, ignoring case. Raises BadValueError with a suggestion."""
    known = {**aliases, **{choice.lower(): choice for choice in choices}}
    wanted = text.strip().lower()
    if wanted not in known:
        raise BadValueError(f"is not known.{did_you_mean(wanted, known)} It must be one of: {', '.join(choices)}.")
    return known[wanted]


def did_you_mean(text: str, known: Mapping[str, str]) -> str:
    """` Did you mean …?` for the nearest of the (lower-case) names, or nothing."""
    near = difflib.get_close_matches(text.lower()[:100], list(known), n=1, cutoff=0.6)
    return f" Did you mean {known[near[0]]}?" if near else ""


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise BadValueError("must be a text; put it in quotation marks.")
    if FORBIDDEN.search(raw):
        raise BadValueError("holds a control character or half a symbol, which cannot be stored; type it again.")
    return raw


def _truth(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower() if isinstance(raw, str) or (type(raw) is int and raw in (0, 1)) else ""
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise BadValueError("must be true or false.")


def _number(parameter: Parameter, raw: object) -> float:
    refusal = BadValueError(f"must be {expectation(parameter)}; for example {shown(parameter.default)}.")
    if isinstance(raw, str):
        plain = raw.translate(WIDE).strip()
        if not NUMBER.fullmatch(plain):
            raise refusal
        value = float(plain)
    elif isinstance(raw, (int, float)) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except OverflowError:
            value = math.inf
    else:
        raise refusal
    if not math.isfinite(value):
        raise refusal
    return value


def _whole(parameter: Parameter, raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and WHOLE.fullmatch(plain := raw.translate(WIDE).strip()):
        return int(plain)
    value = _number(parameter, raw)
    if not value.is_integer():
        nearest = _nearest(parameter, value)
        raise BadValueError(f"must be {expectation(parameter)}, without a fraction; write {nearest}.")
    return int(value)


def _nearest(parameter: Parameter, value: float) -> int:
    """The allowed whole number nearest to `value`."""
    step = parameter.spec.multiple or 1
    low = -math.inf if parameter.spec.low is None else math.ceil(parameter.spec.low / step) * step
    high = math.inf if parameter.spec.high is None else math.floor(parameter.spec.high / step) * step
    if value <= low or value >= high:
        return int(low if value <= low else high)
    return int(min(max(round(value / step) * step, low), high))


def _in_range(parameter: Parameter, value: float) -> float:
    spec = parameter.spec
    low = -math.inf if spec.low is None else spec.low
    high = math.inf if spec.high is None else spec.high
    if not low <= value <= high:
        raise BadValueError(f"is out of range: it must be {expectation(parameter)}.")
    if spec.multiple and value % spec.multiple:
        raise BadValueError(f"must be a multiple of {spec.multiple}; the nearest is {_nearest(parameter, value)}.")
    return value


def _size(parameter: Parameter, raw: object) -> tuple[int, int]:
    parts: Sequence[object]
    if isinstance(raw, str):
        parts = raw.translate(WIDE).split(",")
    elif isinstance(raw, (list, tuple)):
        parts = raw
    else:
        parts = [raw]
    if len(parts) not in (1, 2):
        raise BadValueError(f"must be {expectation(parameter)}; for example 512 or 768,512.")
    sides = [_in_range(parameter, _whole(parameter, part)) for part in parts]
    return int(sides[0]), int(sides[-1])


def _names(parameter: Parameter, raw: object, choices: Sequence[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    if isinstance(raw, str):
        items: list[object] = [part.strip() for part in raw.translate(WIDE).split(",")]
    elif isinstance(raw, (list, tuple)):
        items = list(raw)
    else:
        raise BadValueError(f"must be {expectation(parameter, choices)}.")
    names, wrong = set(), []
    for item in items:
        try:
            name = _text(item)
            names.add(choose(name, choices, aliases) if choices else name)
        except BadValueError:
            near = did_you_mean(item, {choice.lower(): choice for choice in choices}) if isinstance(item, str) else ""
            wrong.append(f"{brief(item, 40)} is not known.{near}")
    if wrong:
        more = f" And {len(wrong) - 5} more." if len(wrong) > 5 else ""
        raise BadValueError(f"{' '.join(wrong[:5])}{more} It must be {expectation(parameter, choices)}.")
    return tuple(choice for choice in choices if choice in names) if choices else tuple(dict.fromkeys(map(str, items)))
