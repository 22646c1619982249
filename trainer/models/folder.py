"""Reading a diffusers folder: the configurations in it rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError, brief
from ..jsontext import JsonError, read_object
from ..paths import is_dir, is_file
from .detect import SUPPORTED, refuse_channels
from .family import FAMILIES
from .keys_text import text_to_one_spelling
from .keys_vae import vae_to_diffusers
from .noise import NoiseFacts, noise_of_scheduler
from .quantised import multiplied_out
from .single import read_tensors
from .source import Source
from .tokenizer import read_vocabulary

_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_folder(path: Path) -> Source:
    """The source of a diffusers folder. Raises ModelError when it is not one of a supported family."""
    if not is_dir(path / "unet"):
        kind = read_json(path / "model_index.json").get("_class_name") if is_file(path / "model_index.json") else None
        what = f"a diffusers {kind}" if kind else "not a diffusers folder (it has no `unet` folder)"
        raise ModelError(f"{path.name}: this is {what}. {SUPPORTED}.")
    unet, unet_config = read_part(path / "unet")
    refuse_channels(unet_config.get("in_channels", 4), path.name)
    source = Source(path.name, {"unet": unet}, _noise(path), path, {"unet": unet_config})
    configs, vocabularies = dict(source.configs), {}
    rows = {row.part: row for _, family in FAMILIES.items() for row in family.texts}
    for part, row in rows.items():
        if is_dir(path / row.folder):
            tensors, configs[part] = read_part(path / row.folder)
            source.parts[part], _ = text_to_one_spelling(tensors)
            found = read_vocabulary(path / row.tokenizer)
            if found is not None:
                vocabularies[part] = found
    if is_dir(path / "vae"):
        source.parts["vae"], configs["vae"] = read_vae_folder(path / "vae")
    source.configs, source.vocabularies = configs, vocabularies
    return source


def read_vae_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in today's diffusers spelling, configuration) of a folder with one VAE."""
    tensors, config = read_part(path)
    return vae_to_diffusers(tensors)[0], config


def read_part(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) of one part of a diffusers model. Raises ModelError when either is missing."""
    if not is_file(folder / "config.json"):
        raise ModelError(f"{folder}: config.json is missing.")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(read_tensors(file)[0])
    tensors = multiplied_out(tensors, str(folder))
    return tensors, read_json(folder / "config.json")


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights: safetensors before pickles, full precision before variants, shards by their index."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16", ".bf16"):
            for stem in _WEIGHTS:
                whole = folder / f"{stem}{variant}.{suffix}"
                if is_file(whole):
                    return [whole]
                for index in (f"{stem}.{suffix}.index{variant}.json", f"{stem}{variant}.{suffix}.index.json"):
                    if is_file(folder / index):
                        return _shards(folder, index)
    raise ModelError(
        f"{folder}: no weights; expected {_WEIGHTS[0]}.safetensors (a VAE, a UNet) or "
        f"{_WEIGHTS[1]}.safetensors (a text encoder)."
    )


def _shards(folder: Path, index: str) -> list[Path]:
    """The files that an index names; they lie beside it. Raises ModelError."""
    table = read_json(folder / index).get("weight_map")
    names = set(map(str, table.values())) if isinstance(table, dict) else set()
    if not names or any(Path(name).name != name or "\\" in name for name in names):
        raise ModelError(f"{folder / index}: its weight_map has to name files of this folder. Get it again.")
    missing = sorted(name for name in names if not is_file(folder / name))
    if missing:
        raise ModelError(f"{folder}: {brief(missing[0])} is missing. Is the download complete?")
    return [folder / name for name in sorted(names)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is not one."""
    try:
        return read_object(path)
    except JsonError as error:
        raise ModelError(f"{path}: this file {error}. Is the download complete? Get it again.") from error


def _noise(path: Path) -> NoiseFacts:
    config = path / "scheduler" / "scheduler_config.json"
    return noise_of_scheduler(read_json(config)) if is_file(config) else NoiseFacts()
