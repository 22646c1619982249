"""The page in a browser, over the real routes and a worker that only pretends, for the tests of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import children
import pytest
from browser import Browser, Page, browser, server

from trainer.places import BASE_PICTURES

gradio = pytest.importorskip("gradio")
pytest.importorskip("playwright")

VERSION = gradio.__version__
KIND = "alone" if int(VERSION.split(".")[0]) > 4 else "host"
"""WebUIs are of gradio 3 and 4 and have the tab among others; the standalone app is of the newest."""

STATE = "document.querySelector('#atelier_live_state').dataset.state"
IDLE = "!['preparing', 'running', 'stopping'].includes(" + STATE + ")"


Place = tuple[Browser, str, Path]
"""A browser, the address of the page, and the folder of its files."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("page")
    port = children.free_port()
    program = str(children.TESTS / "support" / "ui_page.py")
    with server(program, str(port), str(root), KIND, port=port, log=root / "log") as served, browser() as running:
        yield running, served.address, root


@pytest.fixture
def page(place: Place) -> Iterator[Page]:
    opened = Page(place[0], place[1])
    yield opened
    opened.close()


def count(selector: str, number: int) -> str:
    """A script that is true when so many elements are there."""
    return f"document.querySelectorAll('{selector}').length === {number}"


CURSOR = "document.activeElement.id === 'atelier_network_rank'"
CURVES = "#atelier_plot_figure [id^=atelier_loss_] path"


def demo(page: Page, name: str, steps: int = 30) -> None:
    """The settings of the demo, under a name of their own."""
    page.fill(network_alpha=1)  # what an earlier load left there must not pass for this one
    page.id("preset").select_option("demo")
    page.until("the preset is in the form", "document.querySelector('#atelier_network_alpha').value === '16'")
    page.fill(lora_data_directory=BASE_PICTURES, save_lora_name=name, train_iterations=steps)


def ended(page: Page, name: str) -> None:
    row = f"#atelier_queue li[data-state=done] [data-name]:text-is('{name}')"
    page.page.wait_for_selector(row, timeout=120_000)
