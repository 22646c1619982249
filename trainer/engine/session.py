"""Everything a running training consists of, put together by `build` and driven by `loop`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapters.network import Network
from ..maths.scaling import LossScaler
from ..models.base import Model
from ..modes.base import Batch, Mode
from ..optim.optimizers import evaluating
from ..params import core
from ..params.job import Job
from ..stages.base import Stage
from .flat import FlatParameters
from .kit import Kit
from .length import Length
from .process import Process
from .skips import Skips


class Source(Protocol):
    """Where batches come from. `batches_per_epoch` is None where there are no epochs."""

    batches_per_epoch: int | None

    def batch(self, index: int) -> Batch | None:
        """This process's part of global micro batch `index`; None when it has no sample in it."""

    def heaviest(self) -> int:
        """The micro batch that needs most memory."""

    def shape(self, index: int) -> tuple[int, ...]:
        """Whatever of a micro batch decides its memory."""

    def report(self) -> dict[str, object]:
        """What the preflight report says about the data."""

    def on_white(self) -> tuple[str, ...]:
        """The images whose transparent parts are trained as white."""

    def prompts(self) -> tuple[str, ...]:
        """Every prompt a batch can have."""

    def facts(self) -> dict[str, Any]:
        """What a file's metadata says of the data, as fields of `FileFacts`."""

    def fingerprint(self) -> str:
        """Changes when a resumed run would see other data."""


@dataclass(frozen=True)
class Limits:
    """The numbers of the loop. `save_steps` are the optimizer steps after which an intermediate file is written."""

    length: Length
    max_grad_norm: float = 1.0
    state_every: int = 100
    sample_every: int = 0
    save_steps: frozenset[int] = frozenset()
    batch_size: int = 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        return self.length.steps

    @property
    def accumulation(self) -> int:
        """Micro batches of one optimizer step, the last one's aside."""
        return self.length.accumulation


@dataclass
class Session:
    """A training about to run or running. `step` counts finished optimizer steps.

    `job` has the settings of this pass of the mode, `asked` is the job as it was given. `number` counts passes from 0,
    `suffix` is what the names of its file and log have more than the job's; `beneath` are the frozen adapters of
    earlier passes. `scaling`: whether the scaler skipped the last step, and its scale after it (0-d each); None without
    a scaler. `between`: no step is half done, so that what there is now is the state after `step`.
    `restored`: from a resume state, with which no step was done yet.
    """

    job: Job
    asked: Job
    seed: int
    model: Model
    network: Network
    mode: Mode
    kit: Kit
    stages: tuple[Stage, ...]
    source: Source
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: LossScaler
    limits: Limits
    process: Process
    folder: Path
    started_at: float
    number: int = 0
    suffix: str = ""
    beneath: tuple[Network, ...] = ()
    step: int = 0
    between: bool = True
    skips: Skips = field(default_factory=Skips)
    scaling: tuple[Tensor, Tensor] | None = None
    restored: bool = False

    @property
    def name(self) -> str:
        """The name of its file without ending, and of its log."""
        return (self.job[core.Save].save_lora_name or "untitled") + self.suffix

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the network has the values to save or sample with (see `optimizers.evaluating`), exact."""
        with evaluating(self.optimizer), self.flat.exact():
            yield
