"""All readers, by name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from .harness import Reader

WARMING = 3

READERS: dict[str, tuple[str, str]] = {
    "settings_file": ("settings", "SettingsFile"), "settings_text": ("settings", "SettingsText"),
    "cli_flags": ("settings", "Flags"), "presets": ("settings", "PresetFiles"), "paths": ("settings", "Paths"),
    "pictures": ("data", "Pictures"), "captions": ("data", "Captions"), "csv_logs": ("data", "Logs"),
    "cache_files": ("data", "Caches"), "queue_files": ("data", "QueueFiles"),
    "ckpts": ("models", "Checkpoints"), "models": ("models", "Models"), "model_parts": ("models", "Parts"),
    "model_folders": ("models", "Folders"), "vocabularies": ("models", "Vocabularies"),
    "schedules": ("models", "Schedules"),
    "loras": ("loras", "Loras"), "lora_files_other": ("loras", "OtherFiles"),
    "api": ("web", "Routes"), "states": ("states", "States"),
}  # fmt: skip
"""Name → module and class. Modules are imported when they are needed: some take packages that not every set has."""


def open_reader(name: str, root: Path) -> Reader:
    """The reader of that name, with a folder of its own below `root`."""
    module, kind = READERS[name]
    make: Callable[[Path], Reader] = getattr(importlib.import_module(f".{module}", __package__), kind)
    folder = root / name
    folder.mkdir()
    reader = make(folder)
    for number in range(WARMING):  # what is imported and looked up at the first time is no input's fault
        read = reader.make(Random(f"warming {number}"))
        with contextlib.suppress(Exception):
            read()
    return reader


def shares(count: int, costs: dict[str, float]) -> dict[str, int]:
    """How many of `count` inputs each reader gets: fewer of those that take long, and some of each."""
    weights = {name: 1 / (cost + 0.02) ** 0.7 for name, cost in costs.items()}
    total = sum(weights.values())
    return {name: max(1, round(count * weight / total)) for name, weight in weights.items()}
