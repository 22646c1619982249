"""Takes the images of the README from the running app; `python tests/screenshots.py [FOLDER]` writes to docs/images/.

A whole training of the demo, in a browser, with a folder of its own for what it writes.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from app_case import STATE, STEP, App, opened
from browser import Page, browser
from PIL import Image

from trainer.places import ROOT

COLOURS = 128
"""A page has few; the files stay small."""
SAMPLES = "a large red lozenge on the left, white background\na small blue circle on the right, grey background"


def keep(picture: bytes, path: Path) -> None:
    """Write a screenshot with few colours."""
    whole = Image.open(io.BytesIO(picture)).convert("RGB")
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def clip(page: Page, *names: str) -> dict[str, float]:
    """The rectangle around elements, in pixels of the whole page."""
    boxes = [page.id(name).bounding_box() for name in names]
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right, low = (max(box[a] + box[b] for box in boxes) for a, b in (("x", "width"), ("y", "height")))
    return {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": low - top + 16}


def take(page: Page, folder: Path) -> None:
    """Train the demo and keep what is seen."""
    shoot: Any = page.page.screenshot
    page.fill(lora_data_directory="trainer/demo/pictures")  # relative: no folder of this machine in the picture
    page.fill(sample_prompts=SAMPLES, sample_every=50, sample_steps=12, sample_cfg=2)
    page.page.evaluate("document.querySelectorAll('#atelier_form details').forEach(box => box.open = false)")
    page.id("start").click()
    page.until("most of it is done", f"{STEP} >= 110", 2400)
    page.until("samples are there", "!document.querySelector('#atelier_samples').hidden")
    page.page.evaluate("scrollTo(0, 0)")
    keep(shoot(), folder / "tab.png")
    page.until("it ends", f"{STATE} === 'done'", 2400)
    page.id("tab_plot").click()
    page.until("a curve", "document.querySelector('#atelier_plot_figure path') !== null")
    keep(shoot(full_page=True, clip=clip(page, "page_plot")), folder / "plot.png")
    page.id("tab_train").click()
    page.page.locator("#atelier_try > summary").click()
    page.fill(try_width=64, try_height=64, try_steps=12, try_cfg=2, try_prompt=SAMPLES.splitlines()[0], try_seed=3)
    page.id("compare_now").click()
    page.until("four images", "document.querySelectorAll('#atelier_draw_grid img').length === 4", 2400)
    page.page.evaluate("scrollTo(0, 0)")
    keep(shoot(full_page=True, clip=clip(page, "try")), folder / "compare.png")


def main(folder: Path) -> None:
    """Take all pictures."""
    with tempfile.TemporaryDirectory() as root, browser() as running, opened(App(Path(root)), running) as (page, _):
        take(page, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "images")
