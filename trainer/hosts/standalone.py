"""Atelier without a WebUI: folders of our own, the demo model, and our own sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..events import EventLog
from ..models.base import Model
from ..params.core import Task
from ..params.job import Job
from ..places import Places
from .access import gradio_lets_in, is_loopback
from .names import DEMO, MODEL_SUFFIXES, find, problems_to_error

Draw = Callable[[str, str, int, tuple[int, int], int, float], Any]


class Standalone:
    """The host when there is none.

    `draw` makes pictures for `txt2img` (its arguments, then the resolved model file); `address` is what the app listens
    on.
    """

    name = "Atelier"
    prompt_box = None

    def __init__(
        self, places: Places, *, draw: Draw | None = None, address: str = "127.0.0.1", data_root: Path | None = None
    ) -> None:
        self._places, self._draw = places, draw
        self.data_root = data_root
        self.listens_beyond_loopback = not is_loopback(address)

    def places(self) -> Places:
        """The folders given at the start."""
        return self._places

    def checkpoints(self) -> tuple[str, ...]:
        """The demo model, then the files and diffusers folders below the model folder."""
        return (DEMO, *_files(self._places.checkpoints, folders=True))

    def vaes(self) -> tuple[str, ...]:
        """The files below the VAE folder."""
        return _files(self._places.vaes)

    def text_encoders(self) -> tuple[str, ...]:
        """None: models are files with everything in them here."""
        return ()

    def refresh(self) -> None:
        """Nothing: the folders are read each time."""

    def loaded_model(self) -> str | None:
        """The demo model, so that Start Training works at once."""
        return DEMO

    def resolve(self, job: Job) -> Job:
        """The job with paths; no model is the demo model. Raises JobError."""
        task, problems = job[Task], []
        model = find(task.model or DEMO, "model", self._places.checkpoints, problems)
        vae = find(task.vae, "vae", self._places.vaes, problems) if task.vae else ""
        problems_to_error(problems)
        return job.replace(model=model, vae=vae)

    @contextmanager
    def borrow(self, job: Job, log: EventLog) -> Iterator[Model | None]:
        """Nothing is loaded that could be lent."""
        yield None

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """A picture by our own sampler; None without one."""
        return None if self._draw is None else self._draw(prompt, negative, seed, size, steps, cfg)

    def refresh_loras(self) -> None:
        """Nobody keeps a list."""

    def authorised(self, request: Any) -> bool:
        """Whether gradio's login let the sender in, or there is none."""
        return gradio_lets_in(request)


def _files(folder: Path, *, folders: bool = False) -> tuple[str, ...]:
    """Names below a folder, with forward slashes: model files and, if wanted, diffusers folders."""
    if not folder.is_dir():
        return ()
    found = [path for path in folder.rglob("*") if path.suffix.lower() in MODEL_SUFFIXES]
    whole = [path.parent.parent for path in folder.rglob("unet/config.json")] if folders else []
    inside = {path for path in found if any(part in path.parents for part in whole)}
    return tuple(sorted(path.relative_to(folder).as_posix() for path in [*found, *whole] if path not in inside))
