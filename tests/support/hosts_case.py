"""A WebUI's stand-in with our host in it, and what tests of hosts ask of both."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hosts_fakes import FAKES, Fake
from torch import Tensor

from trainer.engine.catalogue import catalogue
from trainer.events import EventLog, Note
from trainer.hosts import detect
from trainer.hosts.webui import WebUI
from trainer.models.base import Model
from trainer.params.codec import load
from trainer.params.job import Job

CLASSES = {"a1111": "A1111", "forge": "Forge", "neo": "Neo", "reforge": "ReForge"}


def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Fake, WebUI]]:
    """What starts a WebUI with a loaded model and gives it with our host in it."""
    for name in ("modules", "modules_forge", "backend", "ldm_patched", "networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def start(kind: str, family: str = "sd1", dtype: torch.dtype = torch.float32) -> tuple[Fake, WebUI]:
        fake = FAKES[kind](kind, family, tmp_path, monkeypatch, dtype)
        fake.load()
        host = detect.webui()
        assert type(host).__name__ == CLASSES[kind]
        monkeypatch.setattr(type(host), "vocabularies", lambda self: (tiny.vocabulary(tmp_path / "words"),))
        return fake, host

    return start


class Told:
    """A log whose lines can be read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.log = EventLog(lambda event: self.lines.append(event.text) if isinstance(event, Note) else None)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def job(**settings: object) -> Job:
    settings = {"format": 1, "mode": "LoRA", "train_model_precision": "model", **settings}
    return load(settings, catalogue(), complete=False).job


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def addresses(tensors: object) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def parameters(model: Model) -> list[Tensor]:
    return list(weights(model).values())


def weights(model: Model) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, **{text.row.part: text for text in model.text_encoders}}
    return {f"{part}.{name}": tensor for part, tree in parts.items() for name, tensor in tree.named_parameters()}
