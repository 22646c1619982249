"""The page over the real service and routes, in a program of its own: with a worker whose runs train nothing, for the
page alone, among the tabs of a WebUI or by itself. `python tests/ui_page.py PORT FOLDER [alone|host]` shows it.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image

from trainer.engine.catalogue import catalogue
from trainer.errors import DataError, Problem
from trainer.events import EventLog, Note, Preflight, Saved, Stage, Step
from trainer.jobs.entry import Entry
from trainer.jobs.queue import Outcome, Queue
from trainer.jobs.store import open_store
from trainer.params import core
from trainer.params.job import Job
from trainer.places import ROOT, Places
from trainer.ui.api import add_routes
from trainer.ui.service import Service
from trainer.ui.shelf import Shelf
from trainer.ui.wish import Wish

STEP_SECONDS = 0.02


class PageHost:
    """A host with folders below one root."""

    name = "page"
    prompt_box = "#txt2img_prompt textarea"
    listens_beyond_loopback = False
    data_root: Path | None = None

    def __init__(self, root: Path) -> None:
        self._places = Places.standalone(root / "models").under(root / "out").replace(presets=root / "presets")
        shutil.copytree(ROOT / "presets", root / "presets", ignore=shutil.ignore_patterns("user"), dirs_exist_ok=True)
        for folder in (self._places.loras, self._places.logs, self._places.json):
            folder.mkdir(parents=True, exist_ok=True)

    def places(self) -> Places:
        return self._places

    def checkpoints(self) -> tuple[str, ...]:
        return ("demo", "photon.safetensors")

    def vaes(self) -> tuple[str, ...]:
        return ("vae-ft-mse.safetensors",)

    def text_encoders(self) -> tuple[str, ...]:
        return ()

    def loaded_model(self) -> str | None:
        return "photon.safetensors"

    def refresh(self) -> None:
        pass

    def authorised(self, request: Any) -> bool:
        return True


class PageBackend:
    """Answers in place of the engine."""

    def problems(self, job: Job) -> tuple[Any, ...]:
        given = job[core.Images].lora_data_directory
        absent = given and not Path(given).is_dir()
        return (Problem("lora_data_directory", given, "does not exist. Check the folder."),) if absent else ()

    def amend(self, folder: Path, values: Mapping[str, object]) -> Mapping[str, object]:
        steps = int(str(values["train_iterations"]))
        return {"format": 1, "mode": "LoRA", "save_lora_name": folder.name.split("-", 1)[1], "train_iterations": steps}

    def look(self, job: Job) -> Mapping[str, object]:
        folder = Path(job[core.Images].lora_data_directory)
        if not folder.is_dir():
            raise DataError("there is no such folder")
        pictures = len(list(folder.glob("*.png")))
        steps = int(str(job.value("train_iterations")))
        found = {"pictures": pictures, "captions found": pictures, "captions missing": 0, "steps per epoch": 2}
        return {**found, "steps": steps}

    def unserved(self) -> Mapping[str, Mapping[str, str]]:
        why = "needs the package {}, which is not installed. Install it with: python -m pip install {}"
        return {
            "train_optimizer": {"CAME": why.format(*["pytorch-optimizer"] * 2)},
            "logging_trackers": {"wandb": why.format("wandb", "wandb")},
        }

    def cost(self, job: Job) -> Mapping[str, object]:
        steps = int(str(job.value("train_iterations")))
        return {"steps": steps, "before": 0.5, "per_step": STEP_SECONDS, "memory_mb": 3000}

    def memory(self) -> Mapping[str, object]:
        return {"device": "CPU", "used_mb": 3100, "total_mb": 24000}

    def picture(self, wish: Wish) -> Image.Image:
        level = int(128 + 60 * max(min(wish.strength, 2), -2))
        return Image.new("RGB", (wish.size[1], wish.size[0]), (level, 120, 255 - level))


class PageControl:
    """What a stop button reaches."""

    def __init__(self) -> None:
        self.stopping = self.saving = False

    def stop(self, save: bool = False) -> None:
        self.stopping, self.saving = True, self.saving or save


class PageWorker:
    """Tells what a run tells, in a few seconds, and writes an empty LoRA and a log."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def control(self) -> PageControl:
        return PageControl()

    def can_resume(self, folder: Path) -> bool:
        return (folder / "state").is_file()

    def run(self, entry: Entry, log: EventLog, control: PageControl) -> Outcome:
        total = int(str(entry.job["train_iterations"]))
        log.note("Loading demo.")
        for done in range(1, 5):
            time.sleep(0.1)
            log.tell(Stage("encoding images", done, 4))
        log.tell(Preflight({"model": "demo", "iterations": total}))
        folder = self._places.logs / "2026-01-01" / f"120000-{entry.name}"
        folder.mkdir(parents=True, exist_ok=True)
        if entry.name.startswith("resumable"):
            (folder / "state").touch()
        with (folder / f"{entry.name}.csv").open("w", encoding="utf-8") as csv:
            csv.write("network_rank,16\nStep,Loss,Learning Rate 1\n")
            for step in range(1, total + 1):
                if control.stopping:
                    break
                time.sleep(STEP_SECONDS)
                ema = 0.2 + 0.3 / math.sqrt(step)
                loss = ema + 0.05 * math.sin(step * 12.9898) * math.cos(step * 78.233)
                csv.write(f"{step},{loss},1e-4\n")
                csv.flush()
                log.tell(Step(step, total, loss, ema, (1e-4,), 2 / STEP_SECONDS, (total - step) * STEP_SECONDS))
        if control.stopping and not control.saving:
            return Outcome("stopped", "", str(folder))
        path = self._places.loras / f"{entry.name}.safetensors"
        path.write_bytes(b"")
        log.tell(Saved(str(path), total, True))
        log.tell(Note("A line that warns.", "warning"))
        return Outcome("saved_early" if control.stopping else "done", str(path), str(folder))


def make_service(root: Path) -> Service:
    """The real service over the pretended host, engine and worker."""
    host = PageHost(root)
    queue = Queue(open_store(host.places().logs / "queue"), PageWorker(host.places()))
    return Service(catalogue(), host, queue, PageBackend(), Shelf(catalogue(), host.places))


def host_page(app: FastAPI, service: Service) -> Any:
    """The tab as AUTOMATIC1111 and Forge show it: among other tabs, with scripts and styles put into the page."""
    import gradio

    from trainer.ui.tab import build_tab, head

    tab = build_tab(service.catalogue)
    with gradio.Blocks(analytics_enabled=False) as demo, gradio.Tabs():
        with gradio.TabItem("txt2img", id="txt2img", elem_id="tab_txt2img"):
            gradio.Textbox(label="Prompt", elem_id="txt2img_prompt", lines=3)
            with gradio.Row(elem_id="txt2img_steps"):
                gradio.Number(20, label="Steps")
        with gradio.TabItem("Atelier", id="atelier", elem_id="tab_atelier"):
            tab.render()
    original = gradio.routes.templates.TemplateResponse

    def response(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.body = found.body.replace(b"</head>", head().encode() + b"</head>")
        found.init_headers()
        return found

    gradio.routes.templates.TemplateResponse = response
    return gradio.mount_gradio_app(app, demo, "/")


def main(port: int, root: Path, kind: str = "alone") -> None:
    """Serve the page."""
    import uvicorn

    from trainer.ui.tab import mount

    app, service = FastAPI(), make_service(root)
    page = mount(app, service.catalogue) if kind == "alone" else host_page(app, service)
    add_routes(page, service)
    uvicorn.run(page, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
