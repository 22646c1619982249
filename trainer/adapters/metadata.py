"""What a LoRA file says of itself, in the keys WebUIs and kohya's tools read; every value is a string.

No key carries a folder of the user's machine: `base_names` reduces whatever looks like a path to its last part.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ..errors import AdapterError
from ..maths.process import V_PREDICTION

JOB_KEY = "atelier_job"
STRENGTH_KEY = "atelier_baked_strength"
LEVELS = ("full", "minimal", "none")

_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v1_v": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
_LOSSES = {"MSE": "l2", "L1": "l1", "Smooth-L1": "smooth_l1"}
"""Our names of distances, and kohya's."""
_DIFFUSERS = "diffusers"
_GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"

# An absolute path or one from the home folder: C:\ C:/ \\server ~/ file:// or / not inside a word, number or address.
_ROOT = (
    r"(?:file:/{2,}|(?<![A-Za-z])[A-Za-z]:[\\/]|\\\\(?=\w)|(?<![\w~.])~[\w.-]*[\\/]|(?<![\w.])\.{1,2}[\\/]"
    r"|(?<![\w/.)\]}>])/(?=[^\s/]))"
)
_ABSOLUTE = re.compile(_ROOT + r"[^\n\r\t\"'|;,<>*?]*")
_RELATIVE = re.compile(r"^[\w.@-]+(?:[\\/][\w.@-]+)*[\\/]?$")
_PROSE = ("prompt", "trigger", "caption", "tag", "anchors")
_LISTS = ("te",)
"""Keys of several files, separated by ; or line ends."""
_PATHS = ("directory", "folder", "path", "file", "resume", "load", "model", "vae", "image")

_PREDICTIONS = {V_PREDICTION: "v"}
"""modelspec's names where they are not ours."""


@dataclass(frozen=True)
class FileFacts:
    """All that a file's metadata is made of; plain values, filled in by the engine. Empty means unknown: left out.

    Times are unix seconds. `resolution` is (width, height). `bucket_counts`: "WxH" → pictures. `dataset_folders`:
    name → (repeats, pictures); `pictures`: all of them, each as often as it is repeated. `tag_frequency`: folder →
    tag → count. `strength`: what ΔW was multiplied with at export. `more`: further keys as they are. `export`: how the
    file stands to what was trained, said from minimal on.
    """

    name: str
    base_version: str = "sd_v1"
    prediction: str = "epsilon"
    model_name: str = ""
    model_hash: str = ""
    model_short_hash: str = ""
    vae_name: str = ""
    network_type: str = "lierla"
    network_module: str = "networks.lora"
    network_rank: int = 16
    network_alpha: float = 8.0
    network_args: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    started_at: float = 0.0
    finished_at: float = 0.0
    session_id: int | None = None
    step: int = 0
    steps: int = 0
    epoch: int = 0
    epochs: int = 0
    seed: int | None = None
    resolution: tuple[int, int] | None = None
    pictures: int = 0
    batches_per_epoch: int | None = None
    mirrored: bool = False
    bucket_counts: Mapping[str, int] = field(default_factory=dict)
    dataset_folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    clip_skip: int = 1
    trigger_word: str = ""
    timestep_range: tuple[int, int] | None = None
    learning_rate: float | None = None
    unet_learning_rate: float | None = None
    text_encoder_learning_rate: float | None = None
    optimizer: str = ""
    scheduler: str = ""
    warmup_steps: int = 0
    batch_size: int = 0
    accumulation: int = 1
    processes: int = 1
    zero_terminal_snr: bool = False
    dropout: float = 0.0
    max_norm: float = 0.0
    max_grad_norm: float | None = None
    min_snr_gamma: float | None = None
    loss: str = ""
    loss_weighting: str = "none"
    mixed_precision: str = ""
    gradient_checkpointing: bool = False
    job: Mapping[str, object] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)
    export: Mapping[str, str] = field(default_factory=dict)


def build_metadata(facts: FileFacts, level: str = "full") -> dict[str, str]:
    """The metadata of a file, keys sorted. Hashes of the tensors are added by `write_lora`.

    `level`: full (all that is known and the whole job), minimal (what WebUIs show and sort by), none (nothing but the
    baked strength where it is not 1, without which a later resume would multiply by it again). Raises ValueError for
    another level.
    """
    if level not in LEVELS:
        raise ValueError(f"save_metadata = {level!r}: choose one of {', '.join(LEVELS)}")
    found: dict[str, object] = {}
    if facts.strength != 1.0 or level != "none":
        found[STRENGTH_KEY] = repr(float(facts.strength))
    if level != "none":
        found.update(_minimal(facts))
        found.update(_modelspec(facts))
        found.update(facts.export)
    if level == "full":
        found.update(_full(facts))
        found.update(facts.more)
        found[JOB_KEY] = base_names(facts.job)
    return {key: _text(value) for key, value in sorted(found.items()) if value not in (None, "")}


def baked_strength(metadata: Mapping[str, str]) -> float:
    """The strength a file was exported with, 1.0 when it does not say. Raises AdapterError when it is not a number."""
    text = metadata.get(STRENGTH_KEY, "1.0")
    try:
        return float(text)
    except ValueError as error:
        raise AdapterError(f"{STRENGTH_KEY} in the LoRA file is {text!r}, not a number. Take another file.") from error


def _minimal(facts: FileFacts) -> dict[str, object]:
    """kohya's keys that WebUIs show, sort or decide by."""
    return {
        "ss_output_name": facts.name,
        "ss_base_model_version": facts.base_version,
        "ss_v2": facts.base_version.startswith("sd_v2"),
        "ss_sd_model_name": base_names(facts.model_name),
        "ss_network_module": facts.network_module,
        "ss_network_dim": facts.network_rank,
        "ss_network_alpha": facts.network_alpha,
        "ss_network_args": _network_args(facts) or None,
        "ss_training_started_at": facts.started_at or None,
        "ss_resolution": "({}, {})".format(*facts.resolution) if facts.resolution else "",
        "ss_num_train_images": facts.pictures,
        "ss_num_reg_images": 0,
        "ss_clip_skip": facts.clip_skip,
        "ss_tag_frequency": {base_names(folder): dict(tags) for folder, tags in facts.tag_frequency.items()},
        "ss_dataset_dirs": {
            base_names(folder): {"n_repeats": repeats, "img_count": count}
            for folder, (repeats, count) in facts.dataset_folders.items()
        },
    }


def _network_args(facts: FileFacts) -> dict[str, str]:
    named = {"algo": facts.network_type} if facts.network_module == "lycoris.kohya" else {}
    return {**named, **facts.network_args}


def _full(facts: FileFacts) -> dict[str, object]:
    """kohya's further keys, as far as they have a meaning here."""
    buckets = {
        "buckets": {
            str(number): {"resolution": [int(side) for side in size.split("x")], "count": count}
            for number, (size, count) in enumerate(facts.bucket_counts.items())
        }
    }
    return {
        "ss_session_id": facts.session_id,
        "ss_training_finished_at": facts.finished_at or None,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.unet_learning_rate,
        "ss_text_encoder_lr": facts.text_encoder_learning_rate,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.scheduler,
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_batch_size_per_device": facts.batch_size or None,
        "ss_total_batch_size": facts.batch_size * facts.processes * facts.accumulation or None,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_max_grad_norm": facts.max_grad_norm,
        "ss_min_snr_gamma": facts.min_snr_gamma,
        "ss_loss_type": _LOSSES.get(facts.loss, facts.loss),
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_network_dropout": facts.dropout or None,
        "ss_scale_weight_norms": facts.max_norm or None,
        "ss_cache_latents": True if facts.bucket_counts else None,
        "ss_flip_aug": facts.mirrored,
        "ss_debiased_estimation": facts.loss_weighting == "debiased",
        "ss_mixed_precision": facts.mixed_precision,
        "ss_seed": facts.seed,
        "ss_steps": facts.step,
        "ss_max_train_steps": facts.steps,
        "ss_epoch": facts.epoch,
        "ss_num_epochs": facts.epochs,
        "ss_sd_model_hash": facts.model_short_hash,
        "ss_new_sd_model_hash": facts.model_hash,
        "ss_vae_name": base_names(facts.vae_name),
        "ss_bucket_info": buckets if facts.bucket_counts else None,
        "ss_enable_bucket": bool(facts.bucket_counts),
    }


def _modelspec(facts: FileFacts) -> dict[str, object]:
    """The keys of modelspec 1.0.1."""
    sdxl = facts.base_version.startswith("sdxl")
    width, height = facts.resolution or ((1024, 1024) if sdxl else (512, 512))
    when = facts.finished_at or facts.started_at
    date = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="seconds") if when else ""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES.get(facts.base_version, facts.base_version)}/lora",
        "modelspec.implementation": _GENERATIVE_MODELS if sdxl else _DIFFUSERS,
        "modelspec.title": facts.name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": date,
        "modelspec.prediction_type": _PREDICTIONS.get(facts.prediction, facts.prediction),
        "modelspec.encoder_layer": facts.clip_skip if facts.clip_skip > 1 else "",
        "modelspec.timestep_range": "{},{}".format(*facts.timestep_range) if facts.timestep_range else "",
        "modelspec.trigger_phrase": facts.trigger_word,
    }


def base_names(value: object, key: str = "") -> object:
    """`value` (also nested in mappings and lists) with everything that looks like a path reduced to its last part.

    A path inside a longer text is reduced where it stands. Values under a key that holds prose (prompts, triggers,
    captions, tags) keep their slashes unless they begin at a root: "and/or" is no path, "/home/me/x.png" always is.
    """
    return _walk(value, key, _base_name)


def _walk(value: object, key: str, reduced: Callable[[str, str], str]) -> object:
    """`value` with `reduced(text, key)` for every text in it, names of mappings included."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return reduced(value, key.lower())
    if isinstance(value, Mapping):
        return {reduced(str(name), key): _walk(inner, str(name), reduced) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(inner, key, reduced) for inner in value]
    return value


def _unrooted(text: str, key: str = "") -> str:
    """Paths that begin at a root, wherever they stand in the text, reduced to their last part."""
    return _ABSOLUTE.sub(lambda found: _last(found.group()), text)


def _base_name(text: str, key: str) -> str:
    if key in _LISTS:
        return ";".join(_last(part.strip().strip('"')) for part in text.replace("\n", ";").split(";"))
    if "/" not in text and "\\" not in text:
        return text
    text = _unrooted(text)
    if "\n" in text or "://" in text or any(word in key for word in _PROSE):
        return text
    return _last(text) if any(word in key for word in _PATHS) or _RELATIVE.match(text) else text


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/ "))[-1]


def _text(value: object) -> str:
    """A metadata value as a string without rooted paths: JSON for mappings, Python's spelling for the rest."""
    value = _walk(value, "", _unrooted)
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, dict) else str(value)
