"""Atelier inside a WebUI: what `scripts/atelier.py` registers there."""

from __future__ import annotations

import functools
from typing import Any

from ..hosts.detect import webui
from ..ui.service import Service
from .service import make_service


@functools.cache
def service() -> Service:
    """The one service of this process. It stays, with its queue and the running job, when the WebUI reloads its pages.

    Raises AtelierError when the queue cannot be kept in the logs folder.
    """
    return make_service(webui())


def tab() -> Any:
    """The Blocks of the tab, made anew at each load of the WebUI's pages."""
    from ..ui.tab import build_tab

    return build_tab(service().catalogue)


def add_routes(app: Any) -> None:
    """Put our routes on the WebUI's application, which is a new one after its pages were loaded anew."""
    from ..ui import api

    api.add_routes(app, service())
