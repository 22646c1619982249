"""What the tests for a card share: devices, full-size random models, jobs on them, and what memory is in use."""

from __future__ import annotations

import dataclasses
import gc
import math
from pathlib import Path

import engine_case
import numpy as np
import pytest
import tiny
import torch
from ldm_names import checkpoint as every_tensor
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from trainer.engine.run import Request, Result, run
from trainer.events import EventLog
from trainer.models.base import Model
from trainer.models.load import load_model
from trainer.places import Places

GIB, MIB = 2**30, 2**20
CUDA = torch.device("cuda", 0)
DEVICES = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
"""For tests whose numbers can be looked at without a card too: those of the ordinary suite are small."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW = {"network_blocks(BASE = TextEncoder)": ["M00", "OUT00"], "data_cache": "memory", "save_overwrite": True}
ILECO = {
    "mode": "iLECO", "lora_data_directory": "", "original prompt": "red", "target prompt": "blue",
    "image_size(height, width)": 64,
}  # fmt: skip


def train(case: engine_case.Case, *listeners, device=CUDA, model: Model | None = None, **changes) -> Result:
    """A whole run on a device."""
    job = case.job(**{**FEW, **changes})
    request = Request(job, case.places, model=model, device=device)
    return run(request, EventLog(*listeners), changes.pop("control", None))


def session(case: engine_case.Case, model: Model, **changes):
    """A session ready for its first step, its adapter attached; eject it."""
    return engine_case.session(case, case.job(**{**FEW, **changes}), model)


def loaded(case: engine_case.Case, device: torch.device, precision: str = "fp32") -> Model:
    """The tiny model on a device, stored and computed in a precision, also where a CPU would not."""
    model = load_model(case.model, device=device)
    model.set_precision(storage=DTYPES[precision], compute=DTYPES[precision])
    return model


def moved(made) -> None:
    """Give the adapter a small random ΔW, so that no gradient is zero for its start's sake."""
    stream = torch.Generator().manual_seed(7)
    for flat in made.flat.values:
        flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))
    made.flat.adopt()


def settled() -> tuple[int, int]:
    """Bytes allocated and reserved on the card after everything that nobody holds was given back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@dataclasses.dataclass(frozen=True)
class FullCase(engine_case.Case):
    """A full-size random model in one file, with images of its size."""

    edge: int = 512

    @property
    def places(self) -> Places:
        return dataclasses.replace(super().places, vocabularies=(self.root / "words",))

    def settings(self, **changes: object) -> dict[str, object]:
        return super().settings(**{
            "image_size(height, width)": self.edge, "image_min_length": self.edge, "image_buckets_step": 64,
            "network_rank": 16, "train_model_precision": "fp16", "network_targets": "unet", "train_batch_size": 1,
            "train_iterations": 3, "network_blocks(BASE = TextEncoder)": BLOCKS, **changes,
        })  # fmt: skip


BLOCKS = [
    "BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12)),
]  # fmt: skip


def full(kind: str, root: Path, edge: int, images: int = 2) -> FullCase:
    """Write a random full-size model (2 GB for sd1, 6.5 GB for sdxl in fp16) and images below `root`."""
    tiny.vocabulary(root / "words")
    stream = torch.Generator(CUDA).manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in ((name, tensor.shape) for name, tensor in every_tensor(tiny.FULL[kind], None).items()):
        std = 0.7 / math.sqrt(math.prod(shape[1:]) or 1) if len(shape) > 1 else 0.02
        made = torch.randn(shape, generator=stream, device=CUDA, dtype=torch.float16) * std
        tensors[name] = (made + float(len(shape) == 1 and name.endswith("weight"))).cpu()
    save_file(tensors, root / "model.safetensors")
    folder = root / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(images):
        pixels = random.integers(0, 255, (edge, edge, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a circle", encoding="utf-8")
    return FullCase(root, root / "model.safetensors", folder, edge)
