"""Readers of adapter files: LoRAs of every type and program, bases, curvature, decompositions, collections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from adapter_layers import layers, network, shake
from adapter_specs import SPECS

from trainer.adapters.bases import _read as read_decompositions
from trainer.adapters.basis_file import DOWN, MARK, MEAN, UP, VERSION, read_basis
from trainer.adapters.foreign import DIFFUSERS_KEY, PEFT_FILE, PEFT_SETTINGS, read_any
from trainer.cli.draw import _own_job, _plain_job
from trainer.errors import AdapterError
from trainer.stages.lalora import COLUMNS, ROWS, read_context
from trainer.stages.lalora import MARK as CURVATURE
from trainer.tools.basis import make_basis

from . import mutate
from .data import packed

RANK = 4


def peft(tensors: dict[str, torch.Tensor], inside: str) -> dict[str, torch.Tensor]:
    """The tensors of a plain LoRA under PEFT's names."""
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith(".alpha"):
            made[f"{inside}{name.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = tensor
    return made


class Loras:
    """A LoRA to continue from, for a network of the same or of another type."""

    name, cost = "loras", 0.008

    def __init__(self, root: Path) -> None:
        self.path, self.layers = root / "lora.safetensors", layers()
        self.networks, self.files = {}, {}
        for name, spec in SPECS.items():
            made = network(self.layers, spec)
            shake(made)
            self.networks[name], self.files[name] = made, made.export()

    def make(self, rng: Random) -> Callable[[], object]:
        source = rng.choice(list(self.files))
        target = source if rng.random() < 0.8 else rng.choice(list(self.files))
        tensors = mutate.tensors(rng, self.files[source], 0.05)
        if source == "lierla" and rng.random() < 0.3:
            tensors = peft(tensors, rng.choice(["", "base_model.model.", "unet."]))
        settings = mutate.changed(
            rng, {"unet.lora_alpha": 2, "unet.alpha_pattern": {"x": 3}, "unet.use_rslora": True}, 0.2
        )
        metadata = {DIFFUSERS_KEY: json.dumps(settings), "atelier": "x"} if rng.random() < 0.2 else None
        data = packed(tensors, metadata)
        self.path.write_bytes(data if rng.random() < 0.8 else mutate.safetensors(rng, data))
        return lambda: self._read(target)

    def _read(self, target: str) -> None:
        tensors, metadata = read_any(self.path)
        _own_job(metadata), _plain_job(tensors)
        self.networks[target].load(tensors)
        for adapter in self.networks[target]:
            if not bool(adapter.delta().isfinite().all()):
                raise ValueError(f"{adapter.key} is not finite")


class OtherFiles:
    """Bases, curvature, decompositions, PEFT's folders, collections of LoRAs."""

    name, cost = "lora_files_other", 0.01

    def __init__(self, root: Path) -> None:
        self.root, self.path, self.layers = root / "others", root / "others" / "a.safetensors", layers()
        self.root.mkdir()
        self.network = network(self.layers, SPECS["lierla"])
        shake(self.network)
        self.lora = self.network.export()
        bases, fork, curvature = {}, {}, {}
        for adapter in self.network:
            fan_out, fan_in = adapter.module.weight.flatten(1).shape
            bases |= {f"{adapter.key}.{DOWN}": torch.linalg.qr(torch.randn(fan_in, RANK)).Q.T,
                      f"{adapter.key}.{UP}": torch.linalg.qr(torch.randn(fan_out, RANK)).Q,
                      f"{adapter.key}.{MEAN}": torch.randn(RANK, RANK)}  # fmt: skip
            for side, size in (("down", fan_in), ("up", fan_out)):
                head = f"{adapter.key}.lora_{side}.weight"
                fork |= {f"{head}.basis": torch.randn(size, RANK), f"{head}.mean": torch.randn(size)}
            curvature |= {f"{adapter.key}.{ROWS}": torch.rand(fan_out), f"{adapter.key}.{COLUMNS}": torch.rand(fan_in)}
        self.kinds = {
            "basis": (bases, {MARK: VERSION}), "fork": (fork, None), "curvature": (curvature, {CURVATURE: VERSION}),
            "svd": (bases, {"atelier_svd": "1"}), "peft": (peft(self.lora, "base_model.model."), None),
            "collection": (self.lora, None),
        }  # fmt: skip

    def make(self, rng: Random) -> Callable[[], object]:
        kind = rng.choice(list(self.kinds))
        given, metadata = self.kinds[kind]
        path = self.root / PEFT_FILE if kind == "peft" else self.path
        for left in self.root.rglob("*.*"):
            left.unlink()
        data = packed(mutate.tensors(rng, given, 0.05), metadata)
        path.write_bytes(data if rng.random() < 0.8 else mutate.safetensors(rng, data))
        if kind == "peft":
            settings = {"lora_alpha": 8, "r": 4, "use_rslora": False, "alpha_pattern": {"a.*": 2}, "use_dora": False}
            (self.root / PEFT_SETTINGS).write_bytes(mutate.as_json(rng, settings, 0.2))
        if kind == "collection":
            (self.root / "b.safetensors").write_bytes(packed({n: t + 1 for n, t in self.lora.items()}))
        return lambda: self._read(kind, path)

    def _read(self, kind: str, path: Path) -> None:
        if kind in ("basis", "fork"):
            read_basis(str(path), self.layers[:7])
        elif kind == "curvature":
            read_context(path, self.network)
        elif kind == "svd":
            read_decompositions(str(path))
        elif kind == "peft":
            self.network.load(read_any(path)[0])
        else:
            try:
                make_basis(self.root, self.root.parent / "basis-out.safetensors", 2)
            except AdapterError as error:
                if "exists" not in str(error):
                    raise
