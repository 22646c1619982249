"""The free-text settings of optimizers and schedulers: `key=value` pairs whose values are Python literals."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from ..errors import JobError, Problem

_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def refuse(field: str, value: object, message: str) -> NoReturn:
    """Raise a JobError with one problem of the parameter `field`."""
    raise JobError([Problem(field, value, message)])


def parse_settings(text: str, field: str = "train_optimizer_settings") -> dict[str, Any]:
    """The settings in `text`, pairs separated by `;` or newlines: `betas=(0.9,0.99);weight_decay=0.01`.

    Values are Python literals and nothing else; a bare list of numbers (`betas=0.9,0.99`) is a tuple.
    Raises JobError naming `field` and the pair that cannot be read.
    """
    settings: dict[str, Any] = {}
    for pair in re.split(r"[;\r\n]", text):
        if not pair.strip():
            continue
        key, equals, literal = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier():
            refuse(field, pair.strip(), "is not key=value. Separate pairs by ; as in betas=(0.9,0.99);eps=1e-8.")
        if key in settings:
            refuse(field, pair.strip(), f"sets {key} a second time. Keep one of them.")
        try:
            settings[key] = ast.literal_eval(literal)
        except _LITERAL_ERRORS:
            refuse(field, pair.strip(), _unreadable(key, literal))
    return settings


def _unreadable(key: str, literal: str) -> str:
    """What is wrong with the value of a pair, and above all whether it holds another pair."""
    if re.search(r"[,\s]\s*[A-Za-z_]\w*\s*=", literal):
        return (
            "holds several pairs. Separate them by ; or line ends, not by commas or blanks: betas=(0.9,0.99);eps=1e-8."
        )
    return (
        f"the value of {key} is not a Python literal. Write numbers as 0.01, texts as 'text', "
        "switches as True or False, nothing as None, several values as (0.9, 0.99)."
    )


def accepted_settings(factory: Callable[..., Any], hidden: Collection[str]) -> dict[str, Any]:
    """Name → default of the named arguments of `factory` that a user may set: all but the `hidden` ones."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in named and p.name not in hidden}


def check_names(settings: Mapping[str, Any], known: Collection[str], of: str, field: str) -> None:
    """Raise JobError naming every setting of `settings` that `of` does not know, each with the nearest one it knows."""
    problems = []
    for name in settings:
        if name in known:
            continue
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        problems.append(Problem(field, name, f"{of} has no such setting.{hint} It knows: {', '.join(sorted(known))}."))
    if problems:
        raise JobError(problems)
