"""The folders of the project and of its host, as one record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Places:
    """Where things are read and written. A host replaces the folders it owns; nothing else knows a path."""

    loras: Path
    checkpoints: Path
    vaes: Path
    presets: Path = ROOT / "presets"
    json: Path = ROOT / "json"
    logs: Path = ROOT / "logs"
    cache: Path = ROOT / "logs" / "cache"
    vocabularies: tuple[Path, ...] = ()
    text_encoders: Path = ROOT / "models" / "text_encoder"

    @staticmethod
    def standalone(models: Path = ROOT / "models") -> Places:
        """The folders used when there is no WebUI, named like a WebUI's."""
        folders = {"loras": "Lora", "checkpoints": "Stable-diffusion", "vaes": "VAE", "text_encoders": "text_encoder"}
        return Places(**{kind: models / name for kind, name in folders.items()})  # type: ignore[arg-type]

    def replace(self, **folders: Path) -> Places:
        """The same with other folders, by name."""
        return dataclasses.replace(self, **folders)  # type: ignore[arg-type]

    def under(self, folder: Path) -> Places:
        """The same layout with everything that is written moved below `folder`."""
        return dataclasses.replace(
            self, loras=folder / "Lora", json=folder / "json", logs=folder / "logs", cache=folder / "logs" / "cache"
        )

    def run_folder(self, name: str, now: datetime) -> Path:
        """`logs/<date>/<time>-<name>`: the folder of one run (not created here)."""
        return self.logs / now.strftime("%Y-%m-%d") / f"{now.strftime('%H%M%S')}-{name}"


BASE_MODEL = ROOT / "trainer" / "demo" / "base"
BASE_PICTURES = ROOT / "trainer" / "demo" / "pictures"
