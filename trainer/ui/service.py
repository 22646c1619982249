"""What the tab and the routes can ask for. Everything comes back as plain values, ready for JSON.

The service knows the table, the queue and the host; whatever needs the engine or the pictures is done by the `Backend`
it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import AtelierError, JobError, Problem
from ..jobs.entry import Entry
from ..jobs.listing import QueueError
from ..jobs.queue import Queue
from ..params import core
from ..params.catalogue import Catalogue
from ..params.codec import Loaded, beside, load, load_rest
from ..params.job import SECOND_PASS, Job
from ..params.widgets import widgets
from ..paths import expanded
from ..places import Places
from . import views
from .fence import DEMO, READS, Fence
from .http import Encoded
from .queue_list import QueueList
from .shelf import Shelf
from .wish import Wish

API_VERSION = 1


class Host(Protocol):
    """What the service uses of the program it lives in."""

    @property
    def name(self) -> str:
        """a1111, forge, … or standalone."""

    @property
    def prompt_box(self) -> str | None:
        """CSS selector of the box that takes a prompt; None where nothing is drawn but by us."""

    @property
    def listens_beyond_loopback(self) -> bool:
        """Whether other machines can reach this program."""

    @property
    def data_root(self) -> Path | None:
        """The folder training data must lie in while other machines can reach this program."""

    def places(self) -> Places:
        """The folders, as they are now."""

    def checkpoints(self) -> tuple[str, ...]:
        """Names of the base models."""

    def vaes(self) -> tuple[str, ...]:
        """Names of the VAE files."""

    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoder files."""

    def loaded_model(self) -> str | None:
        """Title of the model that is loaded now; None when there is none."""

    def refresh(self) -> None:
        """Look into the folders again."""

    def authorised(self, request: Any) -> bool:
        """Whether an HTTP request may be answered."""


class Backend(Protocol):
    """What needs the engine. Handed in, because this package may not import it."""

    def problems(self, job: Job) -> tuple[Problem, ...]:
        """What only the files of this machine can tell: missing model, existing LoRA, no pictures."""

    def look(self, job: Job) -> Mapping[str, object]:
        """What is found in the job's data folder: pictures, captions, buckets, steps per epoch. Raises AtelierError."""

    def cost(self, job: Job) -> Mapping[str, object]:
        """What a right job will take: `steps` (None when only its pictures tell), and from the last run of its kind
        `before` the first step and `per_step` (seconds), `memory_mb`; None where there was none.
        """

    def amend(self, folder: Path, values: Mapping[str, object]) -> Mapping[str, object]:
        """Give the run in a folder other settings for its resume; returns all its settings. Raises AtelierError."""

    def unserved(self) -> Mapping[str, Mapping[str, str]]:
        """Field → value → why the installed packages or the device cannot serve it, with what to do."""

    def memory(self) -> Mapping[str, object]:
        """`device`, `used_mb` and `total_mb` (None where unknown) of what this process holds."""

    def picture(self, wish: Wish) -> Any:
        """A PIL image. Raises AtelierError, also while a training holds the model."""


@dataclass(frozen=True)
class Checked:
    """Settings that were looked at: the job when they can start, all problems and warnings; `of_files` are those of the
    problems that only the files of this machine tell.
    """

    job: Job | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    of_files: tuple[Problem, ...] = ()


class Service:
    """One for each process. Methods may be called from any thread and raise AtelierError for what a user can mend."""

    def __init__(self, catalogue: Catalogue, host: Host, queue: Queue, backend: Backend, shelf: Shelf) -> None:
        self.catalogue, self.host, self.queue, self.backend, self.shelf = catalogue, host, queue, backend, shelf
        self._list = QueueList(queue, self._viewed)

    # ---------------------------------------------------------------- the table

    def schema(self, mode: str = "LoRA", network_type: str = "lierla", second: bool = False) -> dict[str, object]:
        """Modes, adapter types, every field with `visible` for this choice, and `unserved` (see `Backend`)."""
        return {
            "version": API_VERSION,
            "host": self.host.name,
            "modes": {name: info.help for name, info in self.catalogue.modes.items()},
            "types": list(self.catalogue.types),
            "groups": list(core.GROUPS),
            "fields": [views.widget(field) for field in widgets(self.catalogue, mode, second, network_type)],
            "unserved": views.plain(self.backend.unserved()),
        }

    # ---------------------------------------------------------------- checking

    def check(self, raw: Mapping[str, object], *, files: bool = True) -> Checked:
        """All that is wrong with plain settings. With `files` also what only the files of this machine can tell, even
        while other settings are wrong.
        """
        found: list[Problem] = []
        loaded: Loaded | None = None
        try:
            loaded = load(raw, self.catalogue)
        except JobError as error:
            found += error.problems
            found += self._fence().problems(raw, self.catalogue)
        known = load_rest(raw, found, self.catalogue) if loaded is None else loaded.job
        # The values as a run will see them: the table reads some spellings (full-width signs) as others.
        fenced = () if known is None else tuple(self._fence().problems(known.to_dict(full=True), self.catalogue))
        found += beside(fenced, found)
        of_files: tuple[Problem, ...] = ()
        if files and known is not None and not fenced:  # nothing outside the fence is even looked for
            of_files = beside(self.backend.problems(known), found)
        found += of_files
        job = loaded.job if loaded is not None and not found else None
        return Checked(job, tuple(found), loaded.warnings if loaded is not None else (), of_files)

    def _names_file(self, field: str) -> bool:
        parameter = self.catalogue.by_name.get(field)
        return parameter is not None and (parameter.spec.holds in READS or parameter.attribute == "save_lora_name")

    def validate(self, raw: Mapping[str, object], *, files: bool = False) -> dict[str, object]:
        """`ok`, `problems` (field, attribute, second, value, message, and whether it is `of_files`), `warnings` and
        `cost` (see `Backend.cost`; None while there are problems) of plain settings.
        """
        checked = self.check(raw, files=files)
        shown = views.problems(checked.problems, self.catalogue)
        return {
            "ok": not checked.problems,
            "problems": [
                {**view, "of_files": one in checked.of_files} for view, one in zip(shown, checked.problems, strict=True)
            ],
            "warnings": list(checked.warnings),
            "cost": None if checked.job is None else views.plain(self.backend.cost(checked.job)),
        }

    def folder(self, raw: Mapping[str, object]) -> dict[str, object]:
        """What the data folder of plain settings holds, name → value, ready to show. Raises JobError as `readable_job`
        does.
        """
        return views.plain(self.backend.look(self.readable_job(raw)))

    def readable_job(self, raw: Mapping[str, object]) -> Job:
        """The job of plain settings, for a look at its files: what is wrong besides them stands as its default. Raises
        JobError when they may not be looked at, or nothing can be made of the settings.
        """
        first = {name: value for name, value in raw.items() if name != SECOND_PASS}
        try:
            job = load(first, self.catalogue, False).job
        except JobError as error:
            rest = load_rest(first, error.problems, self.catalogue)
            if rest is None or any(self._names_file(problem.field) for problem in error.problems):
                raise
            job = rest
        problems = list(self._fence().problems(job.to_dict(full=True), self.catalogue))
        if problems:
            raise JobError(problems)
        return job

    def _fence(self) -> Fence:
        host = self.host
        lists = {"model": host.checkpoints, "vae": host.vaes, "te": host.text_encoders}

        def listed(kind: str) -> tuple[str, ...]:
            return lists[kind]() if kind in lists else ()

        return Fence(host.places(), host.data_root, not host.listens_beyond_loopback, listed)

    def readable(self, text: str, kind: str, field: str) -> Path:
        """The path a request may read for a kind of thing (see `fence.READS`). Raises JobError at `field`."""
        fence = self._fence()
        if not fence.allows(text, kind):
            raise JobError([Problem(field, text, fence.why())])
        return expanded(text)

    def picture(self, wish: Wish) -> Any:
        """The PIL image of a wish. Raises AtelierError."""
        return self.backend.picture(wish)

    # ---------------------------------------------------------------- running

    def start(self, raw: Mapping[str, object]) -> dict[str, object]:
        """Start a job, or give it its place in the queue when one is running (see `_placed`). Raises JobError with all
        problems.
        """
        job, warnings = self._right(raw)
        return self._placed(self.queue.start(job.to_dict(full=True)), warnings)

    def add(self, raw: Mapping[str, object]) -> dict[str, object]:
        """Put a job at the end of the queue without starting anything. Raises JobError with all problems."""
        job, warnings = self._right(raw)
        return self._placed(self.queue.add(job.to_dict(full=True)), warnings)

    def _right(self, raw: Mapping[str, object]) -> tuple[Job, tuple[str, ...]]:
        checked = self.check(raw)
        if checked.job is None:
            raise JobError(checked.problems)
        return checked.job, checked.warnings

    def _placed(self, entry: Entry, warnings: tuple[str, ...]) -> dict[str, object]:
        """`id`, `position` (0 runs, 1 is next), `message` for the user, `warnings`."""
        position, running = self.queue.position(entry.id), self.queue.running()
        if running is not None and running.id != entry.id:
            message = f"{entry.name} waits in the queue as number {position}; {running.name} is running."
        elif running is None and not self.queue.going:
            message = f"{entry.name} waits in the queue as number {position}."
        else:
            message = f"{entry.name} starts."
        return {"id": entry.id, "position": position, "message": message, "warnings": list(warnings)}

    def stop(self, *, save: bool = False, hold: bool = False) -> dict[str, object]:
        """Stop the running job after its step; `save` writes the LoRA as it stands, `hold` starts no other job."""
        entry = self.queue.stop(save=save, hold=hold)
        what = "stops and saves" if save else "stops"
        return {"id": entry.id, "message": f"{entry.name} {what} after this step."}

    def status(self, revision: int = -1, points: int = 0, after: int = 0) -> dict[str, object]:
        """All that changes while a job runs.

        `revision` and `points`: the loss curve the caller holds and how many points of it; `after`: the last log line
        it holds. Keys: `state` (idle, running, stopping), `run` (the current or last run, None before the first),
        `curve`, `log`, `memory`, `queue` (its revision, the running id, how many wait, whether it is worked off,
        interrupted jobs), `problems` of the queue's files.
        """
        live, queue = self.queue.live, self.queue
        running, facts = queue.present()
        stopping = facts is not None and facts.stopping and not facts.ended
        return {
            "state": "idle" if running is None else "stopping" if stopping else "running",
            "run": None if facts is None else views.run(facts, self.host.places(), self.catalogue),
            "curve": live.curve(revision, points),
            "log": live.lines(after),
            "memory": views.plain(self.backend.memory()),
            "queue": {
                "revision": queue.revision,
                "running": None if running is None else running.id,
                "waiting": len(queue.snapshot().waiting),
                "going": queue.going,
                "interrupted": [self._viewed(entry, -1, True) for entry in queue.resume_offer()],
            },
            "problems": list(queue.problems),
        }

    def events(self, after: int = 0) -> list[dict[str, object]]:
        """What the runs told after sequence number `after`, oldest first."""
        return [views.event(event, self.host.places()) for event in self.queue.live.events(after)]

    def ending(self, identity: str) -> dict[str, object]:
        """How a run ended, in short: `id`, `name`, `started`, `state`, `error`, `lora`, without those when it is not
        listed any more; `next`: `id` and `started` of the one that runs now, None when none does.
        """
        now = self.queue.snapshot()
        following = None if now.running is None else {"id": now.running.id, "started": now.running.started}
        ended = next((entry for entry in now.entries if entry.id == identity), None)
        if ended is None:
            return {"next": following}
        found = self._viewed(ended, -1, False)
        return {name: found[name] for name in ("id", "name", "started", "state", "error", "lora")} | {"next": following}

    # ---------------------------------------------------------------- the queue

    def entries(self) -> Encoded:
        """The whole queue as JSON (see `QueueList`)."""
        return self._list.json()

    def settings_of(self, identity: str) -> dict[str, object]:
        """All settings of a job in the queue, to fill the form. Raises UnknownJobError when it is gone."""
        return dict(self.queue.get(identity).job)

    def move(self, identity: str, place: int) -> Encoded:
        """Put a waiting job at another place (0 is the next); the whole queue comes back."""
        self.queue.move(identity, place)
        return self.entries()

    def delete(self, identity: str) -> Encoded:
        """Take a job out of the list; the whole queue comes back."""
        self.queue.delete(identity)
        return self.entries()

    def clear(self) -> Encoded:
        """Take the jobs that are over and cannot go on out of the list; the whole queue comes back."""
        self.queue.clear(kept=[entry.id for entry in self.queue.ended() if self.queue.can_resume(entry)])
        return self.entries()

    def run_now(self, identity: str) -> Encoded:
        """Make a waiting job the next one and work off the queue; the whole queue comes back."""
        self.queue.run_now(identity)
        return self.entries()

    def resume(self, identity: str) -> Encoded:
        """Let a stopped or interrupted job go on from its state; the whole queue comes back."""
        self.queue.resume(identity)
        return self.entries()

    def extend(self, identity: str, raw: Mapping[str, object]) -> Encoded:
        """Let a job that is over go on with other settings: its length, saves, previews, logs, and where its data and
        models are. Raises JobError for all others, QueueError when it has no state.
        """
        entry = self.queue.get(identity)
        if not raw or not self.queue.can_resume(entry, finished=True):
            why = (
                "it has no saved state. Start it again" if raw else "no setting was given, for example train_iterations"
            )
            raise QueueError(f"{entry.name} ({entry.state}) cannot be extended: {why}.")
        problems = tuple(self._fence().problems(raw, self.catalogue))
        if problems:
            raise JobError(problems)
        self.queue.resume(identity, self.backend.amend(Path(entry.folder), raw))
        return self.entries()

    def go(self) -> Encoded:
        """Work off what waits; the whole queue comes back."""
        self.queue.go()
        return self.entries()

    def hold(self) -> Encoded:
        """Start nothing more after the running job; the whole queue comes back."""
        self.queue.hold()
        return self.entries()

    def _viewed(self, entry: Entry, place: int, resumable: bool) -> dict[str, object]:
        return views.entry(entry, place, resumable, self.host.places(), self.catalogue)

    # ---------------------------------------------------------------- folders

    def models(self, *, refresh: bool = False) -> dict[str, object]:
        """What can be chosen: `checkpoints`, `vaes`, `text_encoders`, `loras`, and the title of the `loaded` model or
        None. `initial` is the preset the form begins with, `prompt_box` the selector of the host's prompt, or "".
        """
        host = self.host
        if refresh:
            host.refresh()
        return {
            "checkpoints": list(host.checkpoints()),
            "vaes": list(host.vaes()),
            "text_encoders": list(host.text_encoders()),
            "loras": self.shelf.loras(),
            "loaded": host.loaded_model(),
            "initial": DEMO if host.prompt_box is None else "",
            "prompt_box": host.prompt_box or "",
        }

    def open_folder(self, which: str) -> str:
        """Show one of our folders (loras, logs, json, presets, images, run) in the file manager of this machine. Raises
        AtelierError when the page may be on another one.
        """
        if self.host.listens_beyond_loopback:
            raise AtelierError("Folders are opened only where nobody else can reach this program.")
        return self.shelf.open_folder(which, self.queue.live.facts())
