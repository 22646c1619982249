"""The tab: one HTML block made from the table; everything it does goes through the routes, from its own script."""

from __future__ import annotations

from typing import Any

from ..params.catalogue import Catalogue
from . import compat
from .drawing import ASSETS
from .html import Html, element, join
from .page import page

TITLE = "Atelier"
PREFIX = "atelier/v1"


def build_tab(catalogue: Catalogue) -> Any:
    """The Blocks of the tab, as a WebUI's `on_ui_tabs` and the standalone page take them."""
    with compat.blocks(TITLE) as block:
        compat.page_block(page(catalogue))
    return block


def head() -> Html:
    """What the page needs in its head where no WebUI puts it there: our style and scripts, from our own routes."""
    scripts = [name for name in ASSETS if name.endswith(".js")]
    address = {name: f"{PREFIX}/assets/{name}?{path.stat().st_mtime_ns}" for name, path in ASSETS.items()}
    return join(
        [
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("link", rel="stylesheet", href=address["style.css"]),
            *(element("script", src=address[name], defer=True) for name in scripts),
        ]
    )


def mount(app: Any, catalogue: Catalogue, path: str = "/") -> Any:
    """The app, on which the routes are already, with the tab as its page."""
    return compat.mount(app, build_tab(catalogue), head(), path)
