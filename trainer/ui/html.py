"""HTML as nested calls: every text is escaped on the way in, so that no file name or preset can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


Child: TypeAlias = "Html | str | Iterable[Child] | None"

VOID = frozenset({"input", "img", "br", "hr", "meta", "link"})


def element(tag: str, *children: Child, **attributes: object) -> Html:
    """`<tag attributes>children</tag>`; plain strings are escaped, None is left out, lists are joined.

    Attribute names drop a trailing `_` and write `_` as `-` (`class_`, `data_key`); True is written bare, None and
    False are left out.
    """
    start = f"<{tag}{''.join(_attributes(attributes))}>"
    return Html(start if tag in VOID else f"{start}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return html.escape(child, quote=False)
    return join(child)


def _attributes(attributes: dict[str, object]) -> Iterable[str]:
    for name, value in attributes.items():
        spelt = name.rstrip("_").replace("_", "-")
        if value is True:
            yield f" {spelt}"
        elif value is not None and value is not False:
            yield f' {spelt}="{html.escape(str(value))}"'
