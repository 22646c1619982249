"""Routes that answer with pictures: the plot of logs, the picture tools, pictures drawn with a LoRA, dropped pictures;
and the files the page itself is made of.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import io
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import DataError, JobError, Problem
from ..params.files import name_problem
from ..places import ROOT
from ..tools.augment_pictures import AugmentSettings, augment_pictures, parse_augment, previews
from ..tools.pair_preview import pair_views
from ..tools.picture_files import check_picture, pictures_of, read_picture
from ..tools.resize_pictures import ResizeSettings, name_at, parse_resize, resize_pictures, resized
from ..writing import names, why, write_new
from .fence import NotServedError
from .http import Call
from .plot import MOST_LOGS, Log, draw, live_log, load_log, parse_plot, read_log
from .shelf import IMAGES
from .wish import Wish

if TYPE_CHECKING:
    from .service import Service

ASSETS: Mapping[str, Path] = {
    **{path.name: path for path in sorted((ROOT / "javascript").glob("*.js"))},
    "style.css": ROOT / "style.css",
    "ja_JP.json": ROOT / "localizations" / "ja_JP.json",
}
MOST_PREVIEWS = 12
PREVIEW_EDGE = 256
AUGMENT = ("source", "output", "copies", "angle", "scale", "side", "seed", "captions")
RESIZE = ("source", "output", "resolutions", "divisible", "interpolation", "png", "associated")
PICTURE = (
    *("prompt", "negative", "seed", "steps", "cfg", "width", "height", "model", "lora", "strength"),
    *("vae", "te", "model_v_pred", "model_zero_terminal_snr", "train_clip_skip"),
)
PLOT = ("logs", "dropped", "smoothing", "logarithmic", "rates")


def asset(service: Service, call: Call) -> Path:
    """A file of the page. Raises NotServedError for any other name."""
    name = call.path["name"]
    if name not in ASSETS:
        raise NotServedError(f"{name[:200]!r} is not there.")
    return ASSETS[name]


def plot(service: Service, call: Call) -> dict[str, object]:
    """The figure of the logs named, or of the latest run, as SVG; `dropped` are logs from the user's own disk."""
    settings = parse_plot(_typed(call, "smoothing"), _flag(call, "logarithmic"), _flag(call, "rates", True))
    folder = service.host.places().logs
    names = [str(name) for name in _list(call, "logs")][:MOST_LOGS]
    dropped = [part for part in _list(call, "dropped") if isinstance(part, Mapping)][:MOST_LOGS]
    logs = [load_log(service.shelf.log(name), name) for name in names] if names or dropped else _latest(service)
    logs += [read_log(str(part.get("name", "")), str(part.get("text", ""))) for part in dropped]
    return {"svg": draw(logs, settings), "shown": [log.name for log in logs], "folder": folder.name}


def _latest(service: Service) -> list[Log]:
    """The newest log, or the current or last run in its place when no log was written since it began."""
    newest = service.shelf.logs()[:1]
    facts = service.queue.live.facts()
    points: Any = service.queue.live.curve()["points"]
    if facts is not None and points:
        began = facts.entry.started
        if not any(service.shelf.log(name).stat().st_mtime > began for name in newest):
            return [live_log(facts.entry.name, points)]
    return [load_log(service.shelf.log(name), name) for name in newest]


# -------------------------------------------------------------------- picture tools


def augment_preview(service: Service, call: Call) -> dict[str, object]:
    """The first turned or shrunk copies, small."""
    found = previews(_source(service, call), _augment(call), MOST_PREVIEWS)
    return {"pictures": [_small(name, picture) for name, picture in found]}


def augment(service: Service, call: Call) -> dict[str, object]:
    """Write turned or shrunk copies into a new folder below `logs/images`."""
    settings, source = _augment(call), _source(service, call)
    with _new_folder(service, call, source) as target:
        return _written(augment_pictures(source, target, settings), target)


def resize_preview(service: Service, call: Call) -> dict[str, object]:
    """The first pictures at each resolution, small, with the size they will have."""
    settings, source = _resize(call), _source(service, call)
    found = []
    for path in pictures_of(source)[: max(MOST_PREVIEWS // len(settings.resolutions), 1)]:
        picture = read_picture(path)
        for resolution in settings.resolutions:
            found.append(_small(name_at(path, resolution, settings.png), resized(picture, resolution, settings)))
    return {"pictures": found}


def resize(service: Service, call: Call) -> dict[str, object]:
    """Write the pictures at all resolutions into a new folder below `logs/images`."""
    settings, source = _resize(call), _source(service, call)
    with _new_folder(service, call, source) as target:
        return _written(resize_pictures(source, target, settings), target)


def upload(service: Service, call: Call) -> dict[str, object]:
    """Keep a picture that was dropped on the page; `data` is base64. Returns its path, for a field that takes one.

    Raises JobError for what is no picture.
    """
    name = Path(call.text("name").replace("\\", "/")).name
    fault = name_problem(name)
    if fault:
        raise JobError([Problem("picture", name, fault)])
    try:
        content = base64.b64decode(call.text("data"), validate=True)
    except binascii.Error as error:
        raise JobError([Problem("picture", name, "was not sent whole; drop it again.")]) from error
    check_picture(name, content)
    folder = _images(service) / time.strftime("dropped-%Y-%m-%d")
    try:
        path = write_new(folder / f"{Path(name).stem}{Path(name).suffix.lower()}", content, reuse=False)
    except OSError as error:
        raise DataError(f"{name} cannot be kept in {folder.name}: {why(error)}.") from error
    return {"path": str(path)}


def _augment(call: Call) -> AugmentSettings:
    numbers = {name: _typed(call, name) for name in ("copies", "angle", "scale", "seed")}
    return parse_augment(numbers, _typed(call, "side") or "anywhere", _flag(call, "captions", True))


def _resize(call: Call) -> ResizeSettings:
    words = {name: _typed(call, name) for name in ("resolutions", "divisible", "interpolation")}
    given = {name: word for name, word in words.items() if word or name == "resolutions"}
    return parse_resize(**given, png=_flag(call, "png"), associated=_flag(call, "associated", True))


def _source(service: Service, call: Call) -> Path:
    given = _typed(call, "source").strip().strip('"')
    if not given:
        raise JobError([Problem("source", given, "is empty; give a folder of images, or drop an image.")])
    return service.readable(given, "folder", "source")


def _images(service: Service) -> Path:
    return service.host.places().logs / IMAGES


@contextlib.contextmanager
def _new_folder(service: Service, call: Call, source: Path) -> Iterator[Path]:
    """A folder below the images that nobody had: `<output>`, `<output>-1`, …; one that stays empty is removed."""
    name = _typed(call, "output").strip() or source.stem
    fault = name_problem(name)
    if fault:
        raise JobError([Problem("output", name, fault)])
    made = _made(_images(service) / name)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            made.rmdir()


def _made(wanted: Path) -> Path:
    try:
        for path in names(wanted):
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
        raise FileExistsError(errno.EEXIST, "too many folders of this name", str(wanted))
    except OSError as error:
        raise DataError(f"The folder {wanted.name} cannot be made in {wanted.parent}: {why(error)}.") from error


def _written(paths: list[Path], target: Path) -> dict[str, object]:
    return {"written": len(paths), "folder": str(target)}


def pairs(service: Service, call: Call) -> dict[str, object]:
    """The pairs of settings as they will be trained on: the first of them, how many, and what is wrong. Raises JobError
    for settings of which nothing can be made.
    """
    views, count, problem = pair_views(service.readable_job(call.settings()))
    shown = [
        {
            "names": list(view.names),
            "original": None if view.original is None else _data(view.original),
            "target": None if view.target is None else _data(view.target),
            "difference": None if view.difference is None else _data(view.difference),
            "share": view.share,
            "size": None if view.size is None else list(view.size),
            "bucket": None if view.bucket is None else list(view.bucket),
        }
        for view in views
    ]
    return {"pairs": shown, "count": count, "problem": problem}


# -------------------------------------------------------------------- pictures of prompts


def picture(service: Service, call: Call) -> dict[str, object]:
    """One picture of a prompt, with a LoRA at a strength or without, as a data address. Raises JobError.

    `model` is drawn with where there is no WebUI; a WebUI takes the one that is loaded.
    """
    values: dict[str, float] = {}
    found = [
        *(_number(call, name, 0, 2**32 - 1, values) for name in ("seed",)),
        _number(call, "steps", 1, 150, values),
        *(_number(call, name, 16, 4096, values) for name in ("width", "height")),
        _number(call, "cfg", 0.0, 50.0, values),
        _number(call, "strength", -10.0, 10.0, values),
    ]
    for name in ("width", "height"):
        if values.get(name, 8) % 8:
            nearest = max(round(values[name] / 8) * 8, 16)
            found.append(Problem(name, values[name], f"must be a multiple of 8; the nearest is {nearest}."))
    if _typed(call, "train_clip_skip"):
        found.append(_number(call, "train_clip_skip", 1, 12, values))
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise JobError(problems)
    model, vae, te = (_typed(call, name) for name in ("model", "vae", "te"))
    for name, kind in ((model, "model"), (vae, "vae"), *((one, "te") for one in re.split(r"[;\n]", te))):
        if name.strip():
            service.readable(name.strip(), kind, kind)
    wish = Wish(
        prompt=_typed(call, "prompt"),
        negative=_typed(call, "negative"),
        seed=int(values["seed"]),
        size=(int(values["height"]), int(values["width"])),
        steps=int(values["steps"]),
        cfg=values["cfg"],
        lora=_typed(call, "lora"),
        strength=values["strength"],
        model=model,
        vae=vae,
        te=te,
        v_pred=_flag(call, "model_v_pred"),
        zero_snr=_flag(call, "model_zero_terminal_snr"),
        clip_skip=int(values.get("train_clip_skip", 1)),
    )
    return {"data": _data(service.picture(wish))}


def _number(call: Call, name: str, low: float, high: float, values: dict[str, float]) -> Problem | None:
    """Put a number that was typed into `values`; a Problem when it is none or out of range. Whole when `low` is."""
    typed = _typed(call, name).strip()
    whole = isinstance(low, int)
    if re.fullmatch(r"[+-]?\d{1,20}" if whole else r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)", typed, re.ASCII):
        values[name] = int(typed) if whole else float(typed)
        if low <= values[name] <= high:
            return None
        del values[name]
    kind = "a whole number" if whole else "a number"
    return Problem(name, typed, f"must be {kind} from {low:g} to {high:g}.")


# -------------------------------------------------------------------- what a body holds


def _typed(call: Call, name: str) -> str:
    """What was typed into a field; "" when it is left out. Raises JobError."""
    value = call.body.get(name, "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise JobError([Problem(name, value, "must be a text or a number.")])
    return str(value)


def _flag(call: Call, name: str, default: bool = False) -> bool:
    return call.flag(name) if name in call.body else default


def _list(call: Call, name: str) -> list[Any]:
    value = call.body.get(name, [])
    if not isinstance(value, list):
        raise JobError([Problem(name, value, "must be a list.")])
    return value


def _small(name: str, picture: Image.Image) -> dict[str, object]:
    small = picture.copy()
    small.thumbnail((PREVIEW_EDGE, PREVIEW_EDGE))
    return {"name": name, "size": f"{picture.width} × {picture.height}", "data": _data(small)}


def _data(picture: Image.Image) -> str:
    target = io.BytesIO()
    picture.save(target, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
