"""Routes of the plot, the picture tools and the pictures drawn with a LoRA, and the files the page itself is made of.

Who may ask is checked where they are registered (`add`); here a request is a dict of what its query and body hold.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import AtelierError, JobError, Problem
from ..params.files import name_problem
from ..places import ROOT
from ..tools.augment_pictures import augment_pictures, parse_augment, previews
from ..tools.picture_files import pictures_of, read_picture
from ..tools.resize_pictures import name_at, parse_resize, resize_pictures, resized
from .plot import MOST_LOGS, draw, find_logs, load_log, parse_plot, read_log

Request = Mapping[str, Any]
Answer = dict[str, object] | tuple[bytes, str]
Add = Callable[[str, str, Callable[[Request], Answer]], None]

ASSETS = {
    **{path.name: "text/javascript" for path in sorted((ROOT / "javascript").glob("*.js"))},
    "style.css": "text/css",
    "ja_JP.json": "application/json",
}
_FOLDERS = {".js": ROOT / "javascript", ".css": ROOT, ".json": ROOT / "localizations"}
MOST_PREVIEWS = 12
PREVIEW_EDGE = 256
MOST_STRENGTH = 10.0


def add_routes(add: Add, service: Any) -> None:
    """Register the routes. `add(method, path, function)` guards and answers; `service` has `places`, `readable(path)`,
    `pictures(...)` (see `Views`)."""
    views = Views(service)
    add("GET", "plot/logs", views.logs)
    add("POST", "plot", views.plot)
    for tool in ("augment", "resize"):
        add("POST", f"images/{tool}/preview", getattr(views, f"{tool}_preview"))
        add("POST", f"images/{tool}", getattr(views, tool))
    add("POST", "picture", views.picture)


def asset(name: str) -> tuple[bytes, str]:
    """A file of the page and its media type. Raises AtelierError for any other name."""
    if name not in ASSETS:
        raise AtelierError(f"{name!r} is no part of the page.")
    return (_FOLDERS[Path(name).suffix] / name).read_bytes(), ASSETS[name]


class Views:
    """The handlers. Of `service` they use `places`, `readable(path)` (raises unless a request may read it) and
    `pictures(prompt=, negative=, seed=, size=(height, width), steps=, cfg=, lora=, strength=)` → a PIL image."""

    def __init__(self, service: Any) -> None:
        self._service = service

    @property
    def _logs(self) -> Path:
        return Path(self._service.places.logs)

    def logs(self, request: Request) -> Answer:
        """The logs there are, newest first."""
        return {"logs": find_logs(self._logs)}

    def plot(self, request: Request) -> Answer:
        """The figure of the logs named, or of the newest one, as SVG; `dropped` are logs of the user's own."""
        settings = parse_plot(_text(request, "smoothing"), bool(request.get("logarithmic")), bool(request.get("rates")))
        names = [str(name) for name in _list(request, "logs")][:MOST_LOGS]
        dropped = [part for part in _list(request, "dropped") if isinstance(part, Mapping)][:MOST_LOGS]
        if not names and not dropped:
            names = find_logs(self._logs, 1)
        logs = [load_log(self._logs, name) for name in names]
        logs += [read_log(_text(part, "name") or "dropped", _text(part, "text")) for part in dropped]
        return {"svg": draw(logs, settings), "shown": [log.name for log in logs]}

    def augment_preview(self, request: Request) -> Answer:
        """The first turned or shrunk copies, small."""
        found = previews(self._source(request), self._augment(request), MOST_PREVIEWS)
        return {"pictures": [_small(name, picture) for name, picture in found]}

    def augment(self, request: Request) -> Answer:
        """Write the copies."""
        settings, source = self._augment(request), self._source(request)
        target = self._target(request, source)
        return _written(augment_pictures(source, target, settings), target)

    def resize_preview(self, request: Request) -> Answer:
        """The first pictures at each resolution, small, with the size they will have."""
        settings, source = self._resize(request), self._source(request)
        found = []
        for path in pictures_of(source)[: max(MOST_PREVIEWS // len(settings.resolutions), 1)]:
            picture = read_picture(path)
            for resolution in settings.resolutions:
                new = resized(picture, resolution, settings)
                found.append(_small(name_at(path, resolution, settings.png), new))
        return {"pictures": found}

    def resize(self, request: Request) -> Answer:
        """Write the pictures at all resolutions."""
        settings, source = self._resize(request), self._source(request)
        target = self._target(request, source)
        return _written(resize_pictures(source, target, settings), target)

    def picture(self, request: Request) -> Answer:
        """One picture of a prompt, with a LoRA at a strength or without, as PNG."""
        whole = {"seed": (0, 2**32 - 1), "steps": (1, 150), "width": (16, 4096), "height": (16, 4096)}
        values: dict[str, float] = {}
        problems = [
            *(_number(request, name, low, high, values) for name, (low, high) in whole.items()),
            _number(request, "cfg", 0.0, 50.0, values),
            _number(request, "strength", -MOST_STRENGTH, MOST_STRENGTH, values),
        ]
        for name in ("width", "height"):
            if not any(problems) and values[name] % 8:
                nearest = max(round(values[name] / 8) * 8, 16)
                right = f"must be a multiple of 8; the nearest is {nearest}."
                problems.append(Problem(name, request.get(name), right))
        if any(problems):
            raise JobError([problem for problem in problems if problem])
        picture = self._service.pictures(
            prompt=_text(request, "prompt"),
            negative=_text(request, "negative"),
            seed=int(values["seed"]),
            size=(int(values["height"]), int(values["width"])),
            steps=int(values["steps"]),
            cfg=values["cfg"],
            lora=_text(request, "lora"),
            strength=values["strength"],
        )
        return _png(picture), "image/png"

    def _augment(self, request: Request) -> Any:
        numbers = {name: _text(request, name) for name in ("copies", "angle", "scale", "seed")}
        return parse_augment(numbers, _text(request, "side") or "anywhere", bool(request.get("captions", True)))

    def _resize(self, request: Request) -> Any:
        return parse_resize(
            _text(request, "resolutions"),
            _text(request, "divisible") or "8",
            _text(request, "interpolation") or "area",
            bool(request.get("png")),
            bool(request.get("associated", True)),
        )

    def _source(self, request: Request) -> Path:
        given = _text(request, "source").strip().strip('"')
        if not given:
            raise JobError([Problem("source", given, "is empty; write a folder of pictures, or drop a picture.")])
        return Path(self._service.readable(given))

    def _target(self, request: Request, source: Path) -> Path:
        """A new folder below `logs/images`; a name that is taken gets a number."""
        name = _text(request, "output").strip() or source.stem
        fault = name_problem(name)
        if fault:
            raise JobError([Problem("output", name, fault)])
        folder = self._logs / "images"
        free = (folder / (name if not number else f"{name}-{number}") for number in range(10_000))
        return next(path for path in free if not path.exists() or not any(path.iterdir()))


def _written(paths: list[Path], target: Path) -> dict[str, object]:
    return {"written": len(paths), "folder": str(target)}


def _text(request: Request, name: str) -> str:
    value = request.get(name, "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise JobError([Problem(name, value, "must be a text.")])
    return str(value)


def _list(request: Request, name: str) -> list[object]:
    value = request.get(name) or []
    if not isinstance(value, list):
        raise JobError([Problem(name, value, "must be a list.")])
    return value


def _number(request: Request, name: str, low: float, high: float, values: dict[str, float]) -> Problem | None:
    """Put the number into `values`; a Problem when it is none or out of range."""
    typed = _text(request, name).strip()
    whole = isinstance(low, int)
    if re.fullmatch(r"[+-]?\d{1,20}" if whole else r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)", typed):
        values[name] = float(typed) if not whole else int(typed)
        if low <= values[name] <= high:
            return None
    kind = "a whole number" if whole else "a number"
    return Problem(name, typed, f"must be {kind} from {low:g} to {high:g}.")


def _small(name: str, picture: Image.Image) -> dict[str, object]:
    import base64

    small = picture.copy()
    small.thumbnail((PREVIEW_EDGE, PREVIEW_EDGE))
    data = base64.b64encode(_png(small)).decode()
    return {"name": name, "size": f"{picture.width} × {picture.height}", "data": f"data:image/png;base64,{data}"}


def _png(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, format="PNG")
    return target.getvalue()
