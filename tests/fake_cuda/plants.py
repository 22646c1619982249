"""Faults planted in the loss of a run on the demo model, to see that each is found: `python -m fake_cuda.plants` prints
{fault: what `run.make` gives} as JSON.
"""

from __future__ import annotations

from .run import Bench, make  # isort: skip (it loads the card's library, before torch)

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .rows import FEW, UNET, Row


def _mixed_devices(loss: Tensor) -> Tensor:
    return loss + torch.ones(1)


def _mixed_precisions(loss: Tensor) -> Tensor:
    return loss + (loss.half()[None] @ loss.bfloat16()[:, None]).sum()


def _low_precision(loss: Tensor) -> Tensor:
    return loss * torch.linalg.svdvals(torch.eye(2, device=loss.device).half()).float().sum()


def _read(loss: Tensor) -> Tensor:
    return loss * float(loss.detach().sum().item())


def _sized_by_content(loss: Tensor) -> Tensor:
    return loss[loss > 0]


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda loss: loss,
    "mixed devices": _mixed_devices,
    "mixed precisions": _mixed_precisions,
    "low precision": _low_precision,
    "read": _read,
    "sized by content": _sized_by_content,
}


def main() -> None:
    """Make a run with each fault."""
    from trainer.modes.lora import LoRA

    plain, found = LoRA.loss, dict[str, Any]()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for number, (name, plant) in enumerate(FAULTS.items()):
            planted = lambda self, kit, batch, plant=plant: plant(plain(self, kit, batch))  # noqa: E731
            with mock.patch.object(LoRA, "loss", planted):
                found[name] = make(Row(name, {**FEW, **UNET}), bench, number)
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the card cannot be ended: there is no CUDA to end it with


if __name__ == "__main__":
    main()
