"""Records as plain values for JSON. Nothing here shows a path: files are named below the folder they lie in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from ..errors import Problem, brief
from ..jobs.entry import Entry
from ..jobs.live import Facts
from ..params.catalogue import Catalogue
from ..params.job import SECOND_PASS
from ..params.table import Parameter
from ..params.values import shown
from ..params.widgets import Widget
from ..places import Places

PREFIX = "/atelier/v1"
HIDDEN = frozenset({"format", "mode"})


def plain(value: object) -> dict[str, object]:
    """A mapping with only what JSON knows: numbers that are not finite become None, anything unknown its text."""
    found = _plain(value)
    return found if isinstance(found, dict) else {}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return value.name
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def widget(field: Widget) -> dict[str, object]:
    """A field of the form."""
    return plain(dataclasses.asdict(field))


def problems(found: Iterable[Problem], catalogue: Catalogue) -> list[dict[str, object]]:
    """Problems with the place in the form they belong to: `attribute` is the plain spelling of `field`."""
    return [problem(one, catalogue) for one in found]


def problem(one: Problem, catalogue: Catalogue) -> dict[str, object]:
    """One problem: field, attribute, second, value (shortened), message."""
    second = one.field.startswith(f"{SECOND_PASS}.")
    key = one.field[len(SECOND_PASS) + 1 :] if second else one.field
    parameter = catalogue.by_name.get(key)
    attribute = parameter.attribute if parameter is not None else ""
    value = one.value if isinstance(one.value, str) else brief(one.value)
    return {
        "field": one.field,
        "attribute": attribute,
        "second": second,
        "value": value[:200],
        "message": one.message,
    }


def below(path: str, folder: Path) -> str:
    """The name of a file below a folder with `/` between its parts; its base name when it lies elsewhere."""
    try:
        return Path(path).resolve().relative_to(folder.resolve()).as_posix()
    except (ValueError, OSError):
        return PurePath(path).name


def picture(path: str, places: Places) -> str:
    """The address of a picture in a run folder."""
    return f"{PREFIX}/files/{below(path, places.logs)}"


def entry(held: Entry, position: int, resumable: bool, places: Places, catalogue: Catalogue) -> dict[str, object]:
    """A job of the queue. `settings` are pairs of label and text: what is not as by default."""
    return {
        "id": held.id,
        "name": held.name,
        "mode": held.mode,
        "model": PurePath(str(held.job.get("model") or "")).name,
        "state": held.state,
        "position": position,
        "resume": held.resume,
        "resumable": resumable,
        "added": held.added,
        "started": held.started,
        "ended": held.ended,
        "step": held.step,
        "total": held.total,
        "error": held.error,
        "lora": PurePath(held.path).name,
        "folder": below(held.folder, places.logs) if held.folder else "",
        "settings": settings(held.job, catalogue),
    }


def settings(job: Mapping[str, object], catalogue: Catalogue) -> list[list[str]]:
    """[label, text] of every setting that is not as by default, in the order of the table, then of the second pass."""
    rows: list[list[str]] = []
    for parameter in catalogue.parameters:
        value = job.get(parameter.key, job.get(parameter.attribute))
        if parameter.attribute not in HIDDEN and value is not None and not _is_default(parameter, value):
            rows.append([parameter.key.replace("_", " "), readable(value)])
    second = job.get(SECOND_PASS)
    if isinstance(second, Mapping):
        rows += [[f"{SECOND_PASS}: {label}", text] for label, text in settings(second, catalogue)]
    return rows


LONGEST = 200
"""Letters of a value in the list of the queue; `GET queue/ID` has all of it."""


def readable(value: object) -> str:
    """A value as people write it, a long one cut."""
    text = _words(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return shown(value) if isinstance(value, (int, float)) else str(value)


def _is_default(parameter: Parameter, value: object) -> bool:
    default = parameter.default
    if parameter.kind == "size" and isinstance(default, tuple):
        return value in (default[0] if default[0] == default[1] else None, f"{default[0]},{default[1]}")
    return value == (list(default) if isinstance(default, tuple) else default)


def run(facts: Facts, places: Places, catalogue: Catalogue) -> dict[str, object]:
    """The current or last run; `ended` says which."""
    held = facts.entry
    step, total = facts.step, facts.total
    stage = facts.stage
    return plain({
        "id": held.id,
        "name": held.name,
        "mode": held.mode,
        "model": facts.report.get("model") or PurePath(str(held.job.get("model") or "")).name,
        "state": held.state,
        "ended": facts.ended,
        "error": held.error,
        "step": step,
        "total": total,
        "progress": step / total if total else 0.0,
        "stage": None if stage is None else {"name": stage.name, "done": stage.done, "total": stage.total},
        "loss": facts.loss,
        "loss_ema": facts.loss_ema,
        "rates": facts.rates,
        "images_per_second": facts.images_per_second,
        "seconds_per_step": facts.seconds_per_step,
        "seconds_left": None if facts.ended else facts.seconds_left,
        "started": held.started,
        "finished": held.ended if facts.ended else None,
        "report": _report(facts.report),
        "samples": [picture(path, places) for path in facts.samples],
        "sampled_at": facts.sampled_at,
        "saved": [{"name": PurePath(one.path).name, "step": one.step, "final": one.final} for one in facts.saved],
        "lora": PurePath(held.path).name,
        "folder": below(facts.folder, places.logs) if facts.folder else "",
    })  # fmt: skip


def _report(report: Mapping[str, object]) -> list[list[object]]:
    return [[name, _plain(value)] for name, value in report.items()]


def event(told: Mapping[str, object], places: Places) -> dict[str, object]:
    """An event without paths: files below the logs folder by their name there, others by their base name."""
    found = plain(told)
    for name in ("path", "folder"):
        if isinstance(found.get(name), str) and found[name]:
            found[name] = below(str(found[name]), places.logs)
    paths = found.get("paths")
    if isinstance(paths, list):
        found["paths"] = [picture(str(path), places) for path in paths]
    return found
