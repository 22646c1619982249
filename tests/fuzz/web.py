"""The routes of the page: bodies, queries, paths."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from urllib.parse import quote

from data_pictures import noise
from service_case import FakeBackend, make

from trainer.engine.preflight import check_before_loading
from trainer.errors import AtelierError, DataError, JobError, Problem
from trainer.params.job import Job
from trainer.tools.picture_files import save_picture
from trainer.ui import api
from trainer.ui.wish import Wish

from . import mutate
from .data import picture
from .harness import Refused
from .settings import base

LEFT_OUT = ("open", "finished", "start", "run", "go", "resume")
"""Routes that start another program, wait for minutes, or begin a job."""


class Backend(FakeBackend):
    """Looks at files as the engine does, and draws nothing."""

    def __init__(self, places) -> None:
        super().__init__()
        self.places = places

    def problems(self, job: Job) -> tuple[Problem, ...]:
        try:
            check_before_loading(job, self.places())
        except JobError as error:
            return error.problems
        except DataError as error:
            return (Problem("lora_data_directory", "", str(error)),)
        return ()

    def picture(self, wish: Wish) -> object:
        raise AtelierError("nothing is drawn here")


class Routes:
    """Any request to any route, answered by an error of ours or by what was asked for."""

    name, cost = "api", 0.01

    def __init__(self, root: Path) -> None:
        self.case = make(root / "service")
        self.case.service.backend = Backend(self.case.host.places)
        self.entrances = [one for one in api.ENTRANCES if one.path.split("/")[-1].split("{")[0] not in LEFT_OUT]
        save_picture(noise((8, 8)), root / "service" / "out" / "logs" / "a.png")
        self.root = root

    def make(self, rng: Random) -> Callable[[], object]:
        one = rng.choice(self.entrances)
        path = one.path
        while "{" in path:
            head, _, rest = path.partition("{")
            path = head + str(rng.choice([*mutate.TEXTS, "LoRA", "a.png", "x"])) + rest.partition("}")[2]
        body = {name: self._value(rng, name) for name in one.body}
        sent = mutate.as_json(rng, body, rng.choice([0.01, 0.1]))
        keys = ("mode", "network_type", "second", "revision", "points", "after", "id", "name", "refresh")
        asked = {rng.choice(keys): str(rng.choice([*mutate.TEXTS, *mutate.NUMBERS])) for _ in range(rng.randrange(3))}
        query = "&".join(f"{key}={quote(value.encode('utf-8', 'replace'))}" for key, value in asked.items())
        path = path.encode("utf-8", "replace").decode()
        return lambda: self._send(one.method, path, sent, query)

    def _value(self, rng: Random, name: str) -> object:
        if name in ("settings", "job"):
            return mutate.changed(rng, base(rng), 0.02)
        if name == "data":
            return base64.b64encode(picture(rng, ".png")).decode()
        return rng.choice(["a.png", "LoRA", str(self.root), "text", 1, 0.5, True, ["a.csv"], "1", *mutate.TEXTS])

    def _send(self, method: str, path: str, body: bytes, query: str) -> None:
        headers = {"content_type": "application/json"} if method == "POST" else {}
        found = self.case.client.send(method, f"/atelier/v1/{path}", body if method == "POST" else b"", query, headers)
        if found.status >= 500:
            raise RuntimeError(
                f"{method} {path[:80]}?{query[:80]} {found.status} {found.content[:400]!r} {body[:200]!r}"
            )
        if found.status >= 400:
            json.loads(found.content or b"{}")
            raise Refused
