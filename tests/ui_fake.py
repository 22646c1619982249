"""The routes of the tab over a service in memory whose runs take seconds and train nothing: for the page alone.

Settings are checked by the real table, presets are the real ones. `python tests/ui_fake.py PORT` shows the page.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from PIL import Image

from trainer.errors import AtelierError, JobError, Problem
from trainer.params.codec import load
from trainer.params.job import Job
from trainer.params.presets import Presets
from trainer.params.table import Catalogue
from trainer.places import BASE_PICTURES, ROOT, Places
from trainer.ui import views_api

PREFIX = "/atelier/v1/"


class Fake:
    """Queue, status and settings of a service that trains nothing; a step takes `step_seconds`."""

    def __init__(self, catalogue: Catalogue, folder: Path, step_seconds: float = 0.02) -> None:
        self.catalogue, self.step_seconds = catalogue, step_seconds
        self.places = Places.standalone(folder / "models").under(folder)
        self.presets = Presets(ROOT / "presets", folder / "presets")
        self.queue: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.curve: list[list[float]] = []
        self.run: dict[str, Any] = {}
        self.requests: list[tuple[float, str]] = []
        self._stop: str = ""
        self._count = 0

    # -------------------------------------------------------- settings

    def loaded(self, raw: object, complete: bool = True) -> dict[str, Any]:
        found = load(raw, self.catalogue, complete)
        return {**self.form(found.job), "warnings": list(found.warnings)}

    @staticmethod
    def form(job: Job) -> dict[str, Any]:
        settings = job.to_dict(full=True)
        second = settings.pop("2nd pass", None)
        extras = {"traintrain": settings.pop("traintrain")} if "traintrain" in settings else {}
        settings.pop("format")
        return {"settings": settings, "second": second, "extras": extras}

    def preset(self, name: str) -> dict[str, Any]:
        raw = self.presets.read(name)
        if name == "demo":
            raw = {**raw, "model": "demo", "lora_data_directory": str(BASE_PICTURES)}  # type: ignore[dict-item]
        return self.loaded(raw, complete=False)

    def validate(self, settings: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"problems": [], "warnings": [], "folder": None, "writes": "", "cost": ""}
        try:
            answer["warnings"] = list(load(settings, self.catalogue).warnings)
            answer["writes"] = f"{settings.get('save_lora_name') or 'untitled'}.safetensors"
        except JobError as error:
            answer["problems"] = problems(error)
        folder = Path(str(settings.get("lora_data_directory") or "/nowhere"))
        if folder.is_dir():
            pictures = len(list(folder.glob("*.png")))
            answer["folder"] = {
                "pictures": pictures, "captions": pictures, "without_caption": 0, "broken": 0, "buckets": 1,
                "steps_per_epoch": math.ceil(pictures / int(settings.get("train_batch_size") or 1)),
            }  # fmt: skip
        return answer

    # -------------------------------------------------------- runs

    def add(self, settings: dict[str, Any], begin: bool) -> dict[str, Any]:
        job = load(settings, self.catalogue).job
        name = str(settings.get("save_lora_name") or "untitled")
        if any(entry["name"] == name for entry in self.queue):
            raise JobError([Problem("save_lora_name", name, "is in the queue already. Choose another name.")])
        self._count += 1
        shown = {key: value for key, value in job.to_dict().items() if key not in ("format", "mode")}
        entry = {
            "id": f"job{self._count}", "name": name, "mode": str(settings["mode"]), "model": "demo", "error": "",
            "state": "waiting", "settings": shown, "steps": int(settings.get("train_iterations") or 10),
        }  # fmt: skip
        self.queue.append(entry)
        if begin and not self.running:
            threading.Thread(target=self._work, daemon=True).start()
        return {"id": entry["id"], "position": len(self.queue) - 1, "warnings": []}

    @property
    def running(self) -> bool:
        return any(entry["state"] == "running" for entry in self.queue)

    def _work(self) -> None:
        while waiting := [entry for entry in self.queue if entry["state"] == "waiting"]:
            entry, self._stop, self.curve = waiting[0], "", []
            entry["state"] = "running"
            self.run = {"id": entry["id"], "job": entry, "state": "preparing", "step": 0, "started": time.time()}
            self.tell(f"Loading {entry['model']}.")
            time.sleep(0.3)
            self.run["state"] = "running"
            for step in range(1, entry["steps"] + 1):
                if self._stop:
                    break
                time.sleep(self.step_seconds)
                loss = 0.2 + 0.3 / math.sqrt(step) + 0.05 * math.sin(step * 12.9898) * math.cos(step * 78.233)
                self.curve.append([step, loss, 0.2 + 0.3 / math.sqrt(step), 1e-4])
                self.run["step"] = step
            self._finish(entry)

    def _finish(self, entry: dict[str, Any]) -> None:
        path = self.places.loras / f"{entry['name']}.safetensors"
        reason = {"": "done", "save": "saved_early", "stop": "stopped"}[self._stop]
        if reason != "stopped":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            self.tell(f"Saved {path.name}.")
        self.queue.remove(entry)
        told = {"reason": reason, "path": str(path), "file name": path.name, "error": "", "problems": []}
        self.run |= {"state": "finished", "finished": told if reason != "stopped" else {**told, "path": None}}
        csv = self.places.logs / "2026-01-01" / f"{entry['name']}.csv"
        csv.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{step},{loss},{rate}" for step, loss, _, rate in self.curve]
        csv.write_text("\n".join(["network_rank,16", "Step,Loss,Learning Rate 1", *rows, ""]), encoding="utf-8")

    def stop(self, save: bool) -> None:
        self._stop = "save" if save else "stop"

    def tell(self, text: str, level: str = "info") -> None:
        self.log.append({"n": len(self.log) + 1, "level": level, "text": text, "at": time.time()})

    def edit(self, name: str, action: str) -> None:
        index = next(i for i, entry in enumerate(self.queue) if entry["id"] == name)
        entry = self.queue.pop(index)
        if action == "up":
            self.queue.insert(max(index - 1, 0), entry)
        elif action == "down":
            self.queue.insert(index + 1, entry)

    def status(self, log: int = 0, curve: int = 0, run: str = "") -> dict[str, Any]:
        state, job = self.run, self.run.get("job", {})
        curve = curve if run == state.get("id") else 0
        total, done = job.get("steps", 0), state.get("step", 0)
        last = self.curve[-1] if self.curve else None
        return {
            "run": state.get("id"), "state": state.get("state", "idle"), "step": done, "total": total,
            "job": {"id": job.get("id"), "name": job.get("name"), "mode": job.get("mode"), "model": "demo"},
            "loss": last and last[1], "loss_ema": last and last[2], "rates": [1e-4], "stage": None,
            "seconds_per_step": self.step_seconds, "seconds_left": (total - done) * self.step_seconds,
            "memory": {"used": 3 * 2**30, "total": 24 * 2**30, "kind": "GPU"}, "samples": None, "banner": "",
            "finished": state.get("finished"), "log": [line for line in self.log if line["n"] > log],
            "log_next": len(self.log), "curve": self.curve[curve:], "curve_next": len(self.curve),
            "queue": copy.deepcopy(self.queue), "last_csv": "",
        }  # fmt: skip

    def readable(self, text: str) -> Path:
        return Path(text)

    def pictures(self, *, size: tuple[int, int], strength: float, **_: Any) -> Image.Image:
        level = int(128 + 60 * max(min(strength, 2), -2))
        return Image.new("RGB", (size[1], size[0]), (level, 120, 255 - level))


def problems(error: JobError) -> list[dict[str, Any]]:
    return [{"field": one.field, "value": str(one.value), "message": one.message} for one in error.problems]


def add_routes(app: FastAPI, fake: Fake) -> None:
    """All routes of the tab over the fake."""
    simple = {
        ("GET", "presets"): lambda r: {"shipped": fake.presets.shipped(), "own": fake.presets.own()},
        ("GET", "settings/files"): lambda r: [],
        ("GET", "lists"): lambda r: lists(),
        ("POST", "lists/refresh"): lambda r: lists(),
        ("POST", "validate"): lambda r: fake.validate(r["settings"]),
        ("POST", "start"): lambda r: fake.add(r["settings"], True),
        ("POST", "queue"): lambda r: fake.add(r["settings"], False),
        ("POST", "stop"): lambda r: fake.stop(r["save"]) or {},
        ("POST", "settings/read"): lambda r: read_settings(r),
        ("GET", "status"): lambda r: fake.status(int(r["log"]), int(r["curve"]), r["run"]),
        ("POST", "open"): lambda r: {},
    }

    def lists() -> dict[str, Any]:
        names = sorted(path.name for path in fake.places.loras.glob("*.safetensors"))
        return {
            "models": ["demo", "photon.safetensors"], "vaes": ["vae-ft-mse.safetensors"], "text_encoders": [],
            "loras": names, "loaded": "photon.safetensors [abc]",
        }  # fmt: skip

    def read_settings(request: dict[str, Any]) -> dict[str, Any]:
        if "metadata" in request:
            raw = request["metadata"].get("atelier_job")
            if not raw:
                raise AtelierError("This LoRA's metadata holds no settings of a training here.")
            return fake.loaded(json.loads(raw), complete=False)
        return fake.loaded(json.loads(request["text"]) if "text" in request else request["settings"], complete=False)

    for (method, path), handler in simple.items():
        _route(app, fake, method, path, handler)

    @app.api_route(PREFIX + "presets/{name}", methods=["GET", "POST", "DELETE"])
    async def presets(name: str, request: Request) -> Response:
        if request.method == "GET":
            return _answer(lambda r: fake.preset(name), {})
        if request.method == "DELETE":
            return _answer(lambda r: fake.presets.delete(name) or {}, {})
        body = await request.json()
        job = load(body["settings"], fake.catalogue, False).job
        return _answer(lambda r: fake.presets.save(name, job) and {}, {})

    @app.post(PREFIX + "queue/{name}")
    async def queue(name: str, request: Request) -> Response:
        body = await request.json()
        return _answer(lambda r: fake.edit(name, body["action"]) or {}, {})

    @app.get(PREFIX + "assets/{name}")
    async def assets(name: str) -> Response:
        data, kind = views_api.asset(name)
        return Response(data, media_type=kind)

    views_api.add_routes(lambda method, path, handler: _route(app, fake, method, path, handler), fake)


def _route(app: FastAPI, fake: Fake, method: str, path: str, handler: Any) -> None:
    async def answer(request: Request) -> Response:
        fake.requests.append((time.time(), path))
        body = await request.json() if method == "POST" else {}
        return _answer(handler, {**request.query_params, **body})

    app.add_api_route(PREFIX + path, answer, methods=[method])


def _answer(handler: Any, request: dict[str, Any]) -> Response:
    try:
        found = handler(request)
    except JobError as error:
        return _json({"problems": problems(error), "warnings": []}, 422)
    except AtelierError as error:
        return _json({"error": str(error)}, 400)
    return Response(found[0], media_type=found[1]) if isinstance(found, tuple) else _json(found, 200)


def _json(value: object, status: int) -> Response:
    return Response(json.dumps(value, default=list), status_code=status, media_type="application/json")


def host_page(app: FastAPI, catalogue: Catalogue) -> Any:
    """The tab as AUTOMATIC1111 and Forge show it: among other tabs, with scripts and styles put into the page's HTML."""
    import gradio

    from trainer.ui.tab import build_tab

    tab = build_tab(catalogue)
    with gradio.Blocks(analytics_enabled=False) as demo, gradio.Tabs():
        with gradio.TabItem("txt2img", id="txt2img", elem_id="tab_txt2img"):
            gradio.Textbox(label="Prompt", elem_id="txt2img_prompt", lines=3)
            with gradio.Row(elem_id="txt2img_steps"):
                gradio.Number(20, label="Steps")
        with gradio.TabItem("Atelier", id="atelier", elem_id="tab_atelier"):
            tab.render()
    original = gradio.routes.templates.TemplateResponse

    def response(*args: Any, **kwargs: Any) -> Any:
        from trainer.ui.tab import head

        found = original(*args, **kwargs)
        found.body = found.body.replace(b"</head>", head().encode() + b"</head>")
        found.init_headers()
        return found

    gradio.routes.templates.TemplateResponse = response
    return gradio.mount_gradio_app(app, demo, "/")


def main(port: int, folder: Path, kind: str = "alone") -> None:
    """Serve the page."""
    import uvicorn

    from trainer.engine.catalogue import catalogue
    from trainer.ui.tab import mount

    app = FastAPI()
    fake = Fake(catalogue(), folder)
    add_routes(app, fake)
    app.state.fake = fake
    page = mount(app, fake.catalogue) if kind == "alone" else host_page(app, fake.catalogue)
    uvicorn.run(page, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
