"""A real browser on a real server: finding Chromium, starting the server, keeping pictures of what was seen."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import pytest

from trainer.places import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
HOW = (
    "No Chromium was found for the tests of the page. Install one (Debian, Ubuntu: sudo apt install chromium; "
    "elsewhere Chrome, or: python -m playwright install chromium), or name it: ATELIER_CHROMIUM=/path/to/chromium."
)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
)  # fmt: skip
PATIENCE = 300.0
"""Seconds that a start may take on a busy machine; idle it takes a few."""

LATE = 4.0
SEEN = ROOT / "artifacts" / "ui"
"""Pictures of the page, for people; git leaves them alone."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A program that answers at an address."""

    address: str
    process: Any


class Browser:
    """A Chromium that runs. Pages of one language share their cache, so that only the first one reads the scripts."""

    def __init__(self, chromium: Any) -> None:
        self._chromium, self._contexts = chromium, dict[str, Any]()

    def new_page(self, language: str) -> Any:
        """An empty page."""
        if language not in self._contexts:
            self._contexts[language] = self._chromium.new_context(locale=language, reduced_motion="reduce")
        return self._contexts[language].new_page()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium. Without one the tests are skipped, with what to do."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested where playwright is installed")
    found = os.environ.get("ATELIER_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = found or (own if Path(own).is_file() else None)
        if path is None:
            pytest.skip(HOW)
        running = driver.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield Browser(running)
        finally:
            running.close()


@contextlib.contextmanager
def server(*command: str, port: int, log: Path) -> Iterator[Served]:
    """A program that serves the page on `port`, until the block ends. Its output goes to `log`."""
    address = f"http://127.0.0.1:{port}/"
    environment = {**children.environment(), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, address, log)
            yield Served(address, process)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: Any, address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"The server ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"The server did not answer within {PATIENCE:g} s:\n{log.read_text()[-3000:]}")


DROP = """(target, [content, name]) => {
    const held = new DataTransfer();
    held.items.add(new File([Uint8Array.from(atob(content), (one) => one.charCodeAt(0))], name));
    target.dispatchEvent(new DragEvent('drop', { dataTransfer: held, bubbles: true, cancelable: true }));
}"""
UNFOLD = "one => { for (let at = one; at = at.parentElement; ) if (at.localName === 'details') at.open = true; }"


class Page:
    """The tab in a browser page: opened, ready, without errors of its scripts."""

    def __init__(
        self,
        running: Browser,
        address: str,
        *,
        width: int = 1280,
        dark: bool = False,
        language: str = "en-US",
        late: str = "",
    ) -> None:
        """`late`: a script of ours that arrives seconds after all others."""
        scheme = "dark" if dark else "light"
        self.page = running.new_page(language)
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.asked: list[tuple[float, str]] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._note)
        if late:
            self.page.route(f"**/{late}?*", lambda route: (time.sleep(LATE), route.continue_()))
        self.page.goto(f"{address}?__theme={scheme}", timeout=PATIENCE * 1000)
        self.page.wait_for_selector("#atelier_root", state="attached", timeout=PATIENCE * 1000)
        tab = self.page.locator("button[role=tab]:text-is('Atelier'), .tab-nav button:text-is('Atelier')")
        if tab.count():
            tab.first.click()
        self.page.wait_for_selector("#atelier_root[data-ready]", timeout=PATIENCE * 1000)
        # The routes were asked for all lists before that, so the first answers are there.

    def _note(self, request: Any) -> None:
        if "/atelier/v1/" in request.url and "/assets/" not in request.url:
            self.asked.append((time.monotonic(), request.url.split("/atelier/v1/")[1].split("?")[0]))

    def id(self, name: str) -> Any:
        """The element atelier_<name>."""
        return self.page.locator(f"#atelier_{name}")

    def fill(self, **values: object) -> None:
        """Type into text fields by name; folds around them are opened."""
        for name, value in values.items():
            self.id(name).evaluate(UNFOLD)
            self.id(name).fill(str(value))

    def drop(self, target: Any, path: Path) -> None:
        """Drop a file on an element."""
        content = base64.b64encode(path.read_bytes()).decode()
        target.evaluate(DROP, [content, path.name])

    def until(self, what: str, script: str, seconds: float = 120.0) -> None:
        """Wait until a script is true in the page."""
        try:
            self.page.wait_for_function(script, timeout=seconds * 1000)
        except Exception as error:
            self.seen("failed")
            pytest.fail(f"{what}: not within {seconds:g} s ({type(error).__name__}); see {SEEN}/failed.png")

    def seen(self, name: str, whole: bool = True) -> None:
        """Keep a picture of the page."""
        SEEN.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SEEN / f"{name}.png"), full_page=whole)

    def close(self) -> None:
        """Close it; its scripts must have made no error."""
        self.page.close()
        assert self.faults == []
