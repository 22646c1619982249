"""The service in an application, over the real table and a worker that does what a test tells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asgi import Client
from fastapi import FastAPI
from queue_case import Gate

from trainer.engine.catalogue import catalogue
from trainer.errors import DataError, JobError, Problem
from trainer.jobs.queue import Queue
from trainer.jobs.store import open_store
from trainer.params import core
from trainer.params.job import Job
from trainer.places import ROOT, Places
from trainer.ui.api import add_routes
from trainer.ui.service import Service
from trainer.ui.shelf import Shelf


class FakeHost:
    """A host with folders below one root."""

    name = "fake"
    prompt_box = None

    def __init__(self, root: Path) -> None:
        places = Places.standalone(root / "models").under(root / "out")
        self._places = places.replace(presets=root / "presets")
        self.listens_beyond_loopback = False
        self.data_root: Path | None = None
        self.password = ""
        self.refreshed = 0
        for folder in (places.loras, places.checkpoints, places.vaes, places.logs, places.json, root / "presets"):
            folder.mkdir(parents=True)
        (root / "presets" / "LoRA.json").write_bytes((ROOT / "presets" / "LoRA.json").read_bytes())

    def places(self) -> Places:
        return self._places

    def checkpoints(self) -> tuple[str, ...]:
        return ("demo", "base.safetensors")

    def vaes(self) -> tuple[str, ...]:
        return ("vae.safetensors",)

    def text_encoders(self) -> tuple[str, ...]:
        return ()

    def loaded_model(self) -> str | None:
        return "base.safetensors"

    def refresh(self) -> None:
        self.refreshed += 1

    def authorised(self, request: Any) -> bool:
        return not self.password or request.cookies.get("word") == self.password


class FakeBackend:
    """Answers for the engine: what a test wants to be wrong with files."""

    def __init__(self) -> None:
        self.wrong: tuple[Problem, ...] = ()
        self.looked: list[str] = []

    def problems(self, job: Job) -> tuple[Problem, ...]:
        return self.wrong

    def look(self, job: Job) -> Mapping[str, object]:
        self.looked.append(job[core.Images].lora_data_directory)
        if not Path(self.looked[-1]).is_dir():
            raise DataError("there is no such folder")
        return {"pictures": 12, "buckets": {"64x64": 12}, "mean": float("nan"), "where": Path("/secret/place")}

    def amend(self, folder: Path, values: Mapping[str, object]) -> Mapping[str, object]:
        if "network_rank" in values:
            raise JobError([Problem("network_rank", values["network_rank"], "has to stay")])
        return {"format": 1, "mode": "iLECO", "save_lora_name": "done", **values}

    def unserved(self) -> Mapping[str, Mapping[str, str]]:
        return {"train_optimizer": {"CAME": "needs the package pytorch-optimizer."}}

    def cost(self, job: Job) -> Mapping[str, object]:
        return {"steps": job[core.Train].train_iterations, "before": 2.0, "per_step": float("nan"), "memory_mb": None}

    def memory(self) -> Mapping[str, object]:
        return {"device": "CPU", "used_mb": 100, "total_mb": 1000}


@dataclasses.dataclass
class Case:
    """Everything of one test."""

    root: Path
    host: FakeHost
    gate: Gate
    backend: FakeBackend
    queue: Queue
    service: Service
    app: FastAPI
    client: Client

    def close(self) -> None:
        self.queue.close(60)
        self.client.close()

    def get(self, path: str, query: str = "", **headers: str) -> Any:
        return self.client.get(f"/atelier/v1/{path}", query, **headers)

    def post(self, path: str, body: object = None, **headers: str) -> Any:
        return self.client.post(f"/atelier/v1/{path}", body, **headers)


def make(root: Path) -> Case:
    host, gate, backend = FakeHost(root), Gate(root), FakeBackend()
    queue = Queue(open_store(host.places().logs / "queue"), gate)
    service = Service(catalogue(), host, queue, backend, Shelf(catalogue(), host.places))
    app = FastAPI()
    add_routes(app, service)
    return Case(root, host, gate, backend, queue, service, app, Client(app))


def settings(name: str = "x", **more: object) -> dict[str, object]:
    """Settings that are right."""
    return {"mode": "iLECO", "save_lora_name": name, "original prompt": "a", "target prompt": "b", **more}
