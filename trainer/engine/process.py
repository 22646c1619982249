"""One process or several: who I am, and sums over all. Several are started by torchrun or accelerate, never by us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import AtelierError
from ..models.room import best_device


class Process:
    """A single process: sums are what they are. `device`: the one to train on, None for the best there is."""

    rank, count = 0, 1

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells events."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""

    def share(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by what the leading process has."""
        for tensor in [] if self.leads else tensors:
            tensor.zero_()
        self.sum(tensors)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leading process runs the block before the others do."""
        yield

    def device(self) -> torch.device:
        """The device that was asked for, else the best that is there."""
        return best_device() if self._device is None else self._device


class ManyProcesses(Process):
    """Processes joined by Hugging Face Accelerate on torch.distributed."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator(cpu=not torch.cuda.is_available())
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        wanted = int(os.environ["WORLD_SIZE"])
        if self.count != wanted:
            raise AtelierError(
                f"WORLD_SIZE is {wanted}, but {self.count} process(es) found each other. Start with torchrun."
            )

    def sum(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(self._accelerator.reduce(tensor, reduction="sum"))

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        with self._accelerator.main_process_first():
            yield

    def device(self) -> torch.device:
        device = torch.device(self._accelerator.device)
        return torch.device("cpu") if device.type == "cpu" else device  # "cpu:0" counts as another device in torch


def this_process(device: torch.device | None = None) -> Process:
    """The process as its launcher describes it (WORLD_SIZE > 1 means several, each on the device it is given), else one
    on `device`.
    """
    return ManyProcesses() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Process(device)
