"""The few signs on buttons, drawn as lines in the colour of the text around them."""

from __future__ import annotations

from .html import Html, element

SHAPES = {
    "refresh": "M13.5 3v3.5H10 M13 6.2A5.5 5.5 0 1 0 13.5 9",
    "save": "M3 3h8l2 2v8H3z M5.5 3v3.5h4.5V3 M5 13V9.5h6V13",
    "trash": "M3 4.5h10 M6 4.5V3h4v1.5 M4.5 4.5l.6 8.5h5.8l.6-8.5",
    "folder": "M2 4h4l1.5 1.5H14V12.5H2z",
    "up": "M8 13V3.5 M4 7.5l4-4 4 4",
    "down": "M8 3v9.5 M4 8.5l4 4 4-4",
    "close": "M4 4l8 8 M12 4l-8 8",
    "play": "M5 3.5v9l7.5-4.5z",
    "stop": "M4.5 4.5h7v7h-7z",
    "plus": "M8 3v10 M3 8h10",
    "copy": "M5.5 5.5h8v8h-8z M10.5 5.5v-3h-8v8h3",
    "first": "M4 3v10 M13 3.5 6.5 8l6.5 4.5z",
}


def icon(name: str) -> Html:
    """One sign, hidden from screen readers: the button around it carries the words."""
    path = element("path", d=SHAPES[name])
    return element("svg", path, class_="atelier-icon", viewBox="0 0 16 16", aria_hidden="true")
