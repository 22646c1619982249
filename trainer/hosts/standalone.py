"""Atelier without a WebUI: folders of our own and the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engine.arguments import text_files
from ..errors import Problem
from ..events import EventLog
from ..models.base import Model
from ..models.room import give_back
from ..params.core import Task
from ..params.job import Job
from ..places import Places
from .access import is_loopback, right_login
from .names import DEMO, MODEL_SUFFIXES, find, problems_to_error


class Standalone:
    """The host when there is none. `address` is what the app listens on, `login` its `name:password`, "" for none."""

    name = "Atelier"
    prompt_box = None

    def __init__(
        self, places: Places, *, address: str = "127.0.0.1", data_root: Path | None = None, login: str = ""
    ) -> None:
        self._places, self._login = places, login
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
        """The files below the folder of text encoders."""
        return _files(self._places.text_encoders)

    def refresh(self) -> None:
        """Nothing: the folders are read each time."""

    def loaded_model(self) -> str | None:
        """The demo model, so that Start Training works at once."""
        return DEMO

    def resolve(self, job: Job) -> Job:
        """The job with paths; no model is the demo model. Raises JobError."""
        task = job[Task]
        problems: list[Problem] = []
        model = find(task.model or DEMO, "model", self._places.checkpoints, problems)
        vae = find(task.vae, "vae", self._places.vaes, problems) if task.vae else ""
        texts = [find(name, "te", self._places.text_encoders, problems) for name in text_files(job)]
        problems_to_error(problems)
        return job.replace(model=model, vae=vae, te=";".join(texts))

    def device(self) -> torch.device | None:
        """The best there is."""
        return None

    @contextmanager
    def borrow(self, job: Job, log: EventLog) -> Iterator[Model | None]:
        """Nothing is loaded that could be lent; what the training took of the device is given back at the end."""
        try:
            yield None
        finally:
            give_back()

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """None: there is no WebUI to draw it; who asks has a sampler of ours."""
        return None

    def refresh_loras(self) -> None:
        """Nobody keeps a list."""

    def authorised(self, request: Any) -> bool:
        """Whether a request brings the password, where there is one."""
        return not self._login or right_login(request.headers.get("authorization", ""), self._login)


def _files(folder: Path, *, folders: bool = False) -> tuple[str, ...]:
    """Names below a folder, with forward slashes: model files and, if wanted, diffusers folders."""
    if not folder.is_dir():
        return ()
    found = [path for path in folder.rglob("*") if path.suffix.lower() in MODEL_SUFFIXES]
    whole = [path.parent.parent for path in folder.rglob("unet/config.json")] if folders else []
    inside = {path for path in found if any(part in path.parents for part in whole)}
    return tuple(sorted(path.relative_to(folder).as_posix() for path in [*found, *whole] if path not in inside))
