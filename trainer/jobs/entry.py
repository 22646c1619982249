"""One job of the queue as a record, and as the JSON of its file."""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT = 1

WAITING, RUNNING, DONE, STOPPED, SAVED, FAILED, INTERRUPTED = STATES = (
    "waiting", "running", "done", "stopped", "saved_early", "failed", "interrupted",
)  # fmt: skip
"""`interrupted`: the process ended while the job ran."""

ENDED = frozenset(STATES) - {WAITING, RUNNING}

IDENTITY = re.compile(r"[0-9a-f]{12,20}-[0-9a-f]{8}")

UNTITLED = "untitled"


class BadEntryError(ValueError):
    """What a file holds is no entry of the queue."""


@dataclass(frozen=True)
class Entry:
    """One job of the queue. `job` are its plain settings, `order` its place among those that wait (lowest first;
    one between two others needs no change of theirs).

    Times are unix seconds. `folder` is the run folder once there is one, `path` the LoRA that was written; `resume`
    says that it goes on from the state in `folder` instead of starting anew.
    """

    id: str
    job: Mapping[str, object] = field(hash=False)
    state: str = WAITING
    order: float = 0.0
    added: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    folder: str = ""
    path: str = ""
    resume: bool = False
    error: str = ""
    step: int = 0
    total: int = 0

    @property
    def name(self) -> str:
        """The name of its LoRA."""
        return str(self.job.get("save_lora_name") or UNTITLED)

    @property
    def mode(self) -> str:
        """Its way of training."""
        return str(self.job.get("mode") or "LoRA")

    def replace(self, **changes: object) -> Entry:
        """The same with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The JSON of its file."""
        return {"format": FORMAT, **dataclasses.asdict(self), "job": dict(self.job)}


def new_entry(job: Mapping[str, object], order: float = 0.0) -> Entry:
    """An entry that waits, under an identity nobody has."""
    identity = f"{time.time_ns():012x}-{secrets.token_hex(4)}"
    return Entry(identity, dict(job), order=order, added=time.time())


_KINDS: Mapping[str, type] = {
    "id": str, "state": str, "order": float, "added": float, "started": float, "ended": float, "folder": str,
    "path": str, "resume": bool, "error": str, "step": int, "total": int,
}  # fmt: skip


def read_entry(raw: object, identity: str) -> Entry:
    """The entry of a file that is named after `identity`. Raises BadEntryError when anything about it is not right."""
    if not isinstance(raw, Mapping):
        raise BadEntryError("it holds no JSON object")
    if raw.get("format") != FORMAT:
        raise BadEntryError(f"its format is {raw.get('format')!r}, this version reads {FORMAT}")
    values: dict[str, object] = {}
    for name, kind in _KINDS.items():
        value = raw.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind:
            raise BadEntryError(f"its {name} is missing or of the wrong kind")
        values[name] = value
    job = raw.get("job")
    if not isinstance(job, Mapping) or not job:
        raise BadEntryError("it holds no settings")
    if values["id"] != identity or not IDENTITY.fullmatch(identity):
        raise BadEntryError("its id is not that of its file")
    if values["state"] not in STATES:
        raise BadEntryError(f"its state {values['state']!r} is not known")
    return Entry(job=dict(job), **values)  # type: ignore[arg-type]
