"""Loading a base model from a file or a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import ModelError
from ..paths import exists
from .assemble import assemble
from .base import Model
from .folder import read_folder, read_vae_folder
from .single import read_single, read_vae
from .source import Source
from .texts import replace_texts

RELATED = 0.3
"""Least cosine between weights of which one was made from the other; between strangers it is near 0."""


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

    `vae_path` replaces its VAE (a file or a folder), `text_paths` its text encoders (files). `v_pred` forces
    v-prediction. `storage` and `vae_storage` None keep the file's precision. `vocabularies` are places to look for
    CLIP's vocabulary before the installed packages. Raises ModelError that says what was recognised when the model
    cannot be used.
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
    own = source.parts.get("vae")
    configs = {part: config for part, config in source.configs.items() if part != "vae"}
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        source.parts["vae"], configs["vae"] = read_vae_folder(folder)
    else:
        source.parts["vae"] = read_vae(path)
    source.configs = configs
    if own is not None and _unrelated(own, source.parts["vae"]):
        source.warnings.append(
            f"The VAE {path.name} has nothing in common with the one in {source.name}. SD 1 and SDXL have VAEs of the"
            " same shapes whose latents mean different things: make sure that it is made for this model, or leave vae"
            " empty."
        )


def _unrelated(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether no encoder weight of two VAEs points even roughly the same way; those made from one another all do."""
    names = [name for name in one if name.startswith("encoder.") and name.endswith((".conv1.weight", "conv_in.weight"))]
    pairs = [(one[name], other[name]) for name in names[:8] if name in other and other[name].shape == one[name].shape]
    vectors = [tuple(side.detach().float().cpu().flatten() for side in pair) for pair in pairs]
    return bool(pairs) and all(float(torch.cosine_similarity(a, b, dim=0)) < RELATED for a, b in vectors)
