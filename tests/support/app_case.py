"""The standalone app in a process of its own, opened in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import children
from browser import Browser, Page, Served, server

STATE = "document.querySelector('#atelier_live_state').dataset.state"
STEP = "Number(document.querySelector('#atelier_live_step').textContent.split(' ')[0])"


class App:
    """`python -m trainer app`, as launch.py starts it, with folders of its own; it can be started again on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.loras = root, children.free_port(), root / "loras"

    def started(self) -> AbstractContextManager[Served]:
        words = ("--port", str(self.port), "--models-dir", str(self.root / "models"))
        out = ("--output-dir", str(self.root / "out"), "--lora-dir", str(self.loras))
        return server("-m", "trainer", "app", *words, *out, port=self.port, log=self.root / "log")


@contextmanager
def opened(app: App, running: Browser) -> Iterator[tuple[Page, Served]]:
    with app.started() as served:
        page = Page(running, served.address)
        yield page, served
        page.close()
