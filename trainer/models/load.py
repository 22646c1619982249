"""Loading a base model from a file or a diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..paths import exists
from ..errors import ModelError
from .assemble import assemble
from .base import Model
from .folder import read_folder, read_vae_folder
from .single import read_single, read_vae
from .source import Source
from .texts import replace_texts


def load_model(
    path: str | Path,
    *,
    vae_path: str | Path | None = None,
    text_paths: Sequence[Path] = (),
    v_pred: bool = False,
    storage: torch.dtype | None = None,
    vae_storage: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vocabularies: Sequence[Path] = (),
) -> Model:
    """The base model at `path`: a `.safetensors` or `.ckpt` file, or a diffusers folder.

    `vae_path` replaces its VAE (a file or a folder), `text_paths` its text encoders (files). `v_pred` forces v-prediction. `storage` and `vae_storage` None
    keep the file's precision. `vocabularies` are places to look for CLIP's vocabulary before the installed packages.
    Raises ModelError that says what was recognised when the model cannot be used.
    """
    path = Path(path)
    if not exists(path):
        raise ModelError(f"{path}: there is no such model file or folder.")
    source = read_folder(path) if path.is_dir() else read_single(path)
    if vae_path is not None:
        replace_vae(source, Path(vae_path))
    if text_paths:
        replace_texts(source, text_paths)
    return assemble(
        source, v_pred=v_pred, storage=storage, vae_storage=vae_storage, device=device, vocabularies=vocabularies
    )


def replace_vae(source: Source, path: Path) -> None:
    """Put the VAE of a file or folder in the place of a source's own. Raises ModelError."""
    if not exists(path):
        raise ModelError(f"{path}: there is no such VAE file or folder.")
    configs = {part: config for part, config in source.configs.items() if part != "vae"}
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        source.parts["vae"], configs["vae"] = read_vae_folder(folder)
    else:
        source.parts["vae"] = read_vae(path)
    source.configs = configs
