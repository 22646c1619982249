"""One parameter as a field of the form: label, input, unit, help and the place where its error appears."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ..params.values import shown
from ..params.widgets import Widget
from .html import Child, Html, element
from .icons import icon

NARROW = frozenset({"number", "choice", "check"})


@dataclass(frozen=True)
class Place:
    """Where a field stands: the tag that shows it, and whether it belongs to the second pass."""

    needs: str
    second: bool = False

    def id_of(self, widget: Widget) -> str:
        """The id of the field's input; its error, help and label add an ending."""
        return f"atelier_{'second_' if self.second else ''}{widget.attribute}"


def field(widget: Widget, place: Place) -> Html:
    """The field of one widget. The input carries its JSON key, the field around it what shows and what resets it."""
    name = place.id_of(widget)
    shape = "lines" if widget.holds == "lines" else widget.kind
    inside = {"check": _check, "checks": _checks, "choice": _choice}.get(widget.kind, _text)
    whole = widget.attribute == "mode"
    return element(
        "div",
        (_modes if whole else inside)(widget, name),
        element("p", class_="atelier-error", id=f"{name}_error", role="alert", hidden=True),
        class_=f"atelier-field atelier-is-{shape}{_width(widget, shape)}",
        data_field=widget.key,
        data_attribute=widget.attribute,
        data_kind=widget.kind,
        data_needs=place.needs or None,
        data_second=place.second,
        data_default=default_text(widget),
        data_holds=widget.holds or None,
    )


def _width(widget: Widget, shape: str) -> str:
    if widget.notes:
        return " atelier-two"
    return "" if shape in NARROW and widget.attribute != "mode" else " atelier-wide"


def default_text(widget: Widget) -> str:
    """The default as the form compares it: names with commas between them, true or false, a number as it is typed."""
    if isinstance(widget.default, list):
        return ",".join(map(str, widget.default))
    return "" if widget.default is None else shown(widget.default)


def bounds(widget: Widget) -> str:
    """The range of a number in signs that every language reads: `1 – 1024 px, × 8`; "" without one."""
    low = "" if widget.low is None else shown(float(widget.low))
    high = "" if widget.high is None or widget.high >= 1e15 else shown(float(widget.high))
    text = f"{low} – {high}" if low and high else f"≥ {low}" if low else f"≤ {high}" if high else ""
    if text and widget.unit:
        text += f" {widget.unit}"
    return text + (f", × {widget.multiple}" if widget.multiple else "")


def _label(widget: Widget, name: str, tag: str = "label") -> Html:
    target = {"for_": name} if tag == "label" else {}
    reset = {"type": "button", "tabindex": -1, "title": "Back to the default", "data_reset": True}
    return element(
        "span",
        element(tag, widget.label, class_="atelier-name", data_plain=True, id=f"{name}_label", **target),
        element("button", class_="atelier-reset", aria_label="Back to the default", **reset),
        _help(widget, name),
        class_="atelier-label",
    )


def _help(widget: Widget, name: str) -> Html:
    limits = bounds(widget)
    return element(
        "span",
        element("span", widget.help),
        element("small", limits) if limits else None,
        class_="atelier-help",
        id=f"{name}_help",
        role="tooltip",
    )


def _described(widget: Widget, name: str) -> dict[str, object]:
    return {"data_key": widget.key, "aria_describedby": f"{name}_help {name}_error"}


def _text(widget: Widget, name: str) -> Child:
    common: dict[str, object] = {
        "id": name,
        "placeholder": default_text(widget) or None,
        "autocomplete": "off",
        "spellcheck": "false",
    }
    common |= _described(widget, name)
    if widget.holds == "lines":
        box: Child = element("textarea", default_text(widget), rows=2, **common)
    else:
        mode = "decimal" if widget.kind == "number" else None
        entry = element("input", type="text", inputmode=mode, value=default_text(widget), **common)
        unit = element("span", widget.unit, class_="atelier-unit", data_plain=True) if widget.unit else None
        box = element("span", entry, unit, class_="atelier-entry")
    return [_label(widget, name), _with_list(widget, name), box, _with_picture(widget, name)]


def _with_list(widget: Widget, name: str) -> Child:
    """A list of the files that a text can stand for, in front of the text itself."""
    if widget.holds not in ("model", "vae", "te", "lora"):
        return None
    return element("select", id=f"{name}_list", data_list=widget.holds, aria_labelledby=f"{name}_label")


def _with_picture(widget: Widget, name: str) -> Child:
    if widget.holds == "folder":
        return element("p", class_="atelier-note", id=f"{name}_note", data_folder_note=True)
    if widget.holds != "picture":
        return None
    return element(
        "button",
        element("img", alt="", hidden=True),
        element("span", "Drop an image here, or click to choose one"),
        type="button",
        class_="atelier-drop",
        data_picture_for=name,
    )


def _choice(widget: Widget, name: str) -> Child:
    default = default_text(widget)
    names = widget.choices if default in widget.choices else (default, *widget.choices)
    options = [element("option", choice, value=choice, selected=choice == default) for choice in names]
    note = element("p", class_="atelier-note", id=f"{name}_note", data_notes=json.dumps(dict(widget.notes)))
    chosen = element("select", options, id=name, **_described(widget, name))
    return [_label(widget, name), chosen, note if widget.notes else None]


def _check(widget: Widget, name: str) -> Child:
    box = element("input", type="checkbox", id=name, checked=widget.default is True, **_described(widget, name))
    return element("span", box, _label(widget, name), class_="atelier-check")


def _modes(widget: Widget, name: str) -> Child:
    default = default_text(widget)
    names = sorted(widget.choices, key=lambda choice: choice != default)
    chips = [
        element(
            "label",
            element("input", type="radio", name=name, value=choice, checked=choice == default),
            element("span", choice),
            class_="atelier-mode",
        )
        for choice in names
    ]
    bar = element("div", chips, class_="atelier-modes", role="radiogroup", id=name, **_described(widget, name))
    values = element(
        "p",
        element("span", id=f"{name}_values_text"),
        element("button", element("span"), type="button", class_="atelier-small", id=f"{name}_values_button"),
        class_="atelier-note atelier-offer",
        id=f"{name}_values",
        role="status",
        hidden=True,
    )
    return [bar, element("p", class_="atelier-note", id=f"{name}_note"), values]


def _checks(widget: Widget, name: str) -> Child:
    chosen = set(widget.default) if isinstance(widget.default, list) else set()
    rows = [
        element("div", [_chip(choice, choice in chosen) for choice in names], class_="atelier-chips")
        for names in families(widget.choices)
    ]
    inside = element("div", rows, class_="atelier-families", role="group", id=name, **_described(widget, name))
    return [element("div", _label(widget, name, "span"), _quick(widget), class_="atelier-row"), inside]


def _chip(choice: str, checked: bool) -> Html:
    box = element("input", type="checkbox", value=choice, checked=checked)
    return element("label", box, element("span", choice), class_="atelier-chip")


def _quick(widget: Widget) -> Child:
    """Buttons that choose all, none, or one family, where there are many names."""
    if len(widget.choices) < 8:
        return None
    names = [letters(part[0]) for part in families(widget.choices) if len(part) > 1]
    words = [("all", "*"), ("none", ""), *((name, name) for name in dict.fromkeys(names))]
    return element(
        "span",
        [element("button", text, type="button", class_="atelier-small", data_pick=pick) for text, pick in words],
        class_="atelier-quick",
    )


def families(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Names cut where their letters change: BASE · IN00 … IN11 · M00 · OUT00 … OUT11."""
    parts: list[list[str]] = []
    for name in names:
        if parts and re.search(r"\d$", name) and letters(parts[-1][0]) == letters(name):
            parts[-1].append(name)
        else:
            parts.append([name])
    many = any(len(part) > 2 for part in parts)
    return [tuple(part) for part in parts] if many else [tuple(names)]


def letters(name: str) -> str:
    """A name without the digits at its end."""
    return name.rstrip("0123456789")


def button(text: str, name: str, *, kind: str = "", sign: str = "", more: Child = None, **attributes: object) -> Html:
    """A button with an id; `kind` is primary, stop or small, `sign` an icon in front, `more` what follows."""
    look = f"atelier-button{f' atelier-{kind}' if kind else ''}"
    inside: list[Child] = [icon(sign) if sign else None, element("span", text) if text else None, more]
    return element("button", inside, type="button", class_=look, id=f"atelier_{name}", **attributes)
