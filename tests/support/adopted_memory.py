"""Run by test_hosts in a process of its own: adopts a model of a few hundred MB and prints its size and by how much the
process grew at its peak, in MB.
"""

from __future__ import annotations

import dataclasses
import resource
import tempfile
from pathlib import Path

import ldm_names
import tiny
import torch
from safetensors.torch import save_file

from trainer.models.live import Live, adopt


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


shape = dataclasses.replace(tiny.SHAPES["sdxl"], width=128, vae=(64, 128, 256, 256))
small = {name: tensor for name, tensor in tiny.checkpoint("sdxl").items()}
with tempfile.TemporaryDirectory() as folder:
    words = [tiny.vocabulary(Path(folder) / "words")]
    file = Path(folder) / "small.safetensors"
    save_file(small, file)
    adopt(Live(file, small), vocabularies=words)  # imports, and whatever is set up once
    del small
    file = Path(folder) / "large.safetensors"
    tensors = {}
    for name, tensor in ldm_names.checkpoint(shape, None).items():  # only shapes
        tensors[name] = torch.full(tensor.shape, 0.01 if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    size = sum(t.untyped_storage().nbytes() for t in tensors.values()) / 2**20
    save_file(tensors, file)
    before = peak()
    model = adopt(Live(file, tensors), vocabularies=words)
    print(size, peak() - before)
