"""Reading a diffusers folder: the configurations in it rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .detect import SUPPORTED, refuse_channels, refuse_quantised
from .family import FAMILIES
from .keys_text import text_to_one_spelling
from .keys_vae import vae_to_diffusers
from .noise import NoiseFacts, noise_of_scheduler
from .single import read_tensors
from .source import Source
from .tokenizer import read_vocabulary

_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_folder(path: Path) -> Source:
    """The source of a diffusers folder. Raises ModelError when it is not one of a supported family."""
    if not (path / "unet").is_dir():
        kind = (
            read_json(path / "model_index.json").get("_class_name") if (path / "model_index.json").is_file() else None
        )
        what = f"a diffusers {kind}" if kind else "not a diffusers folder (it has no `unet` folder)"
        raise ModelError(f"{path.name}: this is {what}. {SUPPORTED}.")
    unet, unet_config = read_part(path / "unet")
    refuse_channels(unet_config.get("in_channels", 4), path.name)
    source = Source(path.name, {"unet": unet}, _noise(path), path, {"unet": unet_config})
    configs, vocabularies = dict(source.configs), {}
    rows = {row.part: row for _, family in FAMILIES.items() for row in family.texts}
    for part, row in rows.items():
        if (path / row.folder).is_dir():
            tensors, configs[part] = read_part(path / row.folder)
            source.parts[part], _ = text_to_one_spelling(tensors)
            found = read_vocabulary(path / row.tokenizer)
            if found is not None:
                vocabularies[part] = found
    if (path / "vae").is_dir():
        source.parts["vae"], configs["vae"] = read_vae_folder(path / "vae")
    source.configs, source.vocabularies = configs, vocabularies
    return source


def read_vae_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in today's diffusers spelling, configuration) of a folder with one VAE."""
    tensors, config = read_part(path)
    return vae_to_diffusers(tensors)[0], config


def read_part(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) of one part of a diffusers model. Raises ModelError when either is missing."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json is missing.")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(read_tensors(file)[0])
    refuse_quantised(tensors, str(folder))
    return tensors, read_json(folder / "config.json")


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights: safetensors before pickles, full precision before variants, shards by their index."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16", ".bf16"):
            for stem in _WEIGHTS:
                whole = folder / f"{stem}{variant}.{suffix}"
                if whole.is_file():
                    return [whole]
                for index in (f"{stem}.{suffix}.index{variant}.json", f"{stem}{variant}.{suffix}.index.json"):
                    if (folder / index).is_file():
                        return [folder / name for name in sorted(set(read_json(folder / index)["weight_map"].values()))]
    raise ModelError(
        f"{folder}: no weights; expected {_WEIGHTS[0]}.safetensors (a VAE, a UNet) or "
        f"{_WEIGHTS[1]}.safetensors (a text encoder)."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object was expected.")
    return content


def _noise(path: Path) -> NoiseFacts:
    config = path / "scheduler" / "scheduler_config.json"
    return noise_of_scheduler(read_json(config)) if config.is_file() else NoiseFacts()
