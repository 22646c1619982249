"""The routes under `/atelier/v1/`: one line each, as described in docs/reference/api.md. The tab uses no others."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.routing import Route

from . import drawing
from .http import Call, Handler, endpoint
from .service import Service
from .views import PREFIX

HELD = 600.0
"""Seconds a request for the end of a run is held at most; proxies cut longer ones."""


@dataclass(frozen=True)
class Entrance:
    """One route: method, path below the prefix, what it does, and the names its body may hold."""

    method: str
    path: str
    handler: Handler
    body: tuple[str, ...] = ()


def _get(path: str, handler: Callable[[Service, Call], object]) -> Entrance:
    return Entrance("GET", path, handler)


def _post(path: str, handler: Callable[[Service, Call], object], *body: str) -> Entrance:
    def checked(service: Service, call: Call) -> object:
        call.only(*body)
        return handler(service, call)

    return Entrance("POST", path, checked, body)


def _schema(service: Service, call: Call) -> object:
    mode = call.query.get("mode", "LoRA")
    second = call.query.get("second") in ("1", "true")
    return service.schema(mode, call.query.get("network_type", "lierla"), second)


def _status(service: Service, call: Call) -> object:
    return service.status(call.asked("revision", -1), call.asked("points", 0), call.asked("after", 0))


async def _finished(service: Service, call: Call) -> object:
    """Waits, without holding a thread, until a run is over, ten minutes have passed or the server wants to end."""
    identity, end = call.query.get("id", ""), time.monotonic() + HELD
    while (running := service.queue.snapshot().running) is not None and running.id == identity:
        if call.leaving() or time.monotonic() > end:
            return {"ended": False}
        await asyncio.sleep(0.25)
    return {"ended": True, **service.ending(identity)}


def _log(service: Service, call: Call) -> object:
    return service.shelf.log(call.path["name"])


ENTRANCES: tuple[Entrance, ...] = (
    _get("schema", _schema),
    _get("status", _status),
    _get("events", lambda s, c: {"events": s.events(c.asked("after", 0))}),
    _get("finished", _finished),
    _post("validate", lambda s, c: s.validate(c.settings(), files=c.flag("files")), "settings", "files"),
    _post("folder", lambda s, c: s.folder(c.settings()), "settings"),
    _post("start", lambda s, c: s.start(c.settings()), "settings"),
    _post("stop", lambda s, c: s.stop(save=c.flag("save"), hold=c.flag("hold")), "save", "hold"),
    _get("queue", lambda s, c: s.entries()),
    _post("queue", lambda s, c: s.add(c.settings()), "settings"),
    _get("queue/{id}", lambda s, c: {"settings": s.settings_of(c.path["id"])}),
    _post("queue/go", lambda s, c: s.go()),
    _post("queue/hold", lambda s, c: s.hold()),
    _post("queue/move", lambda s, c: s.move(c.text("id"), c.whole("to")), "id", "to"),
    _post("queue/delete", lambda s, c: s.delete(c.text("id")), "id"),
    _post("queue/clear", lambda s, c: s.clear()),
    _post("queue/run", lambda s, c: s.run_now(c.text("id")), "id"),
    _post("queue/resume", lambda s, c: s.resume(c.text("id")), "id"),
    _post("queue/extend", lambda s, c: s.extend(c.text("id"), c.settings()), "id", "settings"),
    _get("presets", lambda s, c: s.shelf.presets()),
    _get("presets/{name}", lambda s, c: s.shelf.preset(c.path["name"])),
    _get("modes/{name}", lambda s, c: s.shelf.preset_of_mode(c.path["name"])),
    _post("presets/save", lambda s, c: s.shelf.save_preset(c.text("name"), c.settings()), "name", "settings"),
    _post("presets/delete", lambda s, c: s.shelf.delete_preset(c.text("name")), "name"),
    _get("settings", lambda s, c: {"files": s.shelf.files()}),
    _get("settings/{name:path}", lambda s, c: s.shelf.file(c.path["name"])),
    _post("settings/save", lambda s, c: s.shelf.save_file(c.settings()), "settings"),
    _post("settings/read", lambda s, c: s.shelf.read(c.text("text")), "text"),
    _get("models", lambda s, c: s.models()),
    _post("models/refresh", lambda s, c: s.models(refresh=True)),
    _get("logs", lambda s, c: {"logs": s.shelf.logs()}),
    _get("logs/{name:path}", _log),
    _get("files/{name:path}", lambda s, c: s.shelf.picture(c.path["name"])),
    _post("open", lambda s, c: {"folder": s.open_folder(c.text("folder"))}, "folder"),
    _get("assets/{name}", drawing.asset),
    _post("plot", drawing.plot, *drawing.PLOT),
    _post("images/augment", drawing.augment, *drawing.AUGMENT),
    _post("images/augment/preview", drawing.augment_preview, *drawing.AUGMENT),
    _post("images/resize", drawing.resize, *drawing.RESIZE),
    _post("images/resize/preview", drawing.resize_preview, *drawing.RESIZE),
    _post("pairs", drawing.pairs, "settings"),
    _post("upload", drawing.upload, "name", "data"),
    _post("picture", drawing.picture, *drawing.PICTURE),
)


def add_routes(app: FastAPI, service: Service) -> None:
    """Put our routes in front of all others of an application; what an earlier call put there is replaced.

    In front, because some versions of gradio answer every address; replaced, because a WebUI may hand us the same
    application again when its pages are loaded anew.
    """
    kept = [route for route in app.router.routes if not str(getattr(route, "path", "")).startswith(f"{PREFIX}/")]
    ours = [
        Route(f"{PREFIX}/{one.path}", endpoint(one.handler, service, traceback.print_exc), methods=[one.method])
        for one in ENTRANCES
    ]
    app.router.routes[:] = [*ours, *kept]
