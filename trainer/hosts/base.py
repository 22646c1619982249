"""What the rest of the trainer may ask of the program it lives in. Plain names and paths go in and out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..events import EventLog
from ..models.base import Model
from ..params.job import Job
from ..places import Places


class Host(Protocol):
    """A WebUI, or none.

    `listens_beyond_loopback`: others than this machine can reach it. `data_root`: the only folder from which jobs may
    read pictures then. `prompt_box`: CSS selector of the box that takes a prompt, where the host has one.
    """

    name: str
    listens_beyond_loopback: bool
    data_root: Path | None
    prompt_box: str | None

    def places(self) -> Places:
        """The folders that models and LoRAs are in."""

    def checkpoints(self) -> tuple[str, ...]:
        """Names of the base models one can train on, as a job's `model` takes them."""

    def vaes(self) -> tuple[str, ...]:
        """Names of the VAE files."""

    def text_encoders(self) -> tuple[str, ...]:
        """Names of the separate text encoder files."""

    def refresh(self) -> None:
        """Look for new files before the lists are asked for again."""

    def loaded_model(self) -> str | None:
        """The name (as in `checkpoints`) of the model that an empty `model` stands for; None when there is none."""

    def resolve(self, job: Job) -> Job:
        """The job with full paths in place of the names of models; empty ones become what is loaded.

        Raises JobError with all names that are not known.
        """

    def device(self) -> torch.device | None:
        """The device that the host computes on; None: the best that is there."""

    def borrow(self, job: Job, log: EventLog) -> AbstractContextManager[Model | None]:
        """Lend the GPU, and the loaded model where it is the one of the (resolved) job, to a training.

        None stands for: read the model from its file. Drawing waits inside the block; everything is given back at its
        end, however it ends: first what the training took, if nobody holds the lent model any more, then what the host
        had moved away for it.
        """

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """A PIL picture of `size` (height, width) in pixels; None when this host cannot draw.

        Raises BusyError while its model is lent.
        """

    def refresh_loras(self) -> None:
        """Make a new LoRA file known without a restart."""

    def authorised(self, request: Any) -> bool:
        """Whether a request (starlette's) comes from somebody the host has let in."""
