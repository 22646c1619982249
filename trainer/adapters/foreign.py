"""Files of other programs in our names: tensor names of PEFT and diffusers, and alphas that stand elsewhere.

Which layer a name means is `Layer.also`'s; here is what follows it. A file that is written as kohya and LyCORIS write
comes through unchanged.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from ..jsontext import JsonError, parse, read_object
from ..paths import is_file
from .checked import LARGEST_ALPHA, check_forms
from .file import read_lora
from .file_delta import DOWN, MAGNITUDE, MID, RANK_AXES, UP

DIFFUSERS_KEY = "lora_adapter_metadata"
"""Metadata key under which diffusers keeps PEFT's settings of each part, as JSON text."""

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_WRAPPED = re.compile(r"^(?:base_model\.model\.|diffusion_model\.base_model\.model\.)")

# diffusers before PEFT kept LoRA in attention processors, and in the text encoder beside the projections.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_TEXT_ATTENTION = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.(down|up)\.weight$")

_TAILS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern + "$"), name)
    for pattern, name in (
        (r"\.lora_A(?:\.[^.]+)?(?:\.weight)?", f".{DOWN}"),
        (r"\.lora_B(?:\.[^.]+)?(?:\.weight)?", f".{UP}"),
        (r"\.(?:lora|lora_linear_layer)\.down\.weight", f".{DOWN}"),
        (r"\.(?:lora|lora_linear_layer)\.up\.weight", f".{UP}"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", f".{MAGNITUDE}"),
        (r"\.lora_mid\.[^.]+\.weight", f".{MID}"),
    )
)


def in_our_names(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """The tensors of a LoRA file under the names of kohya and LyCORIS, layers still as the file calls them.

    `metadata` is the file's; `settings` what PEFT keeps in a file of its own. Where a LoRA has no alpha, it is made
    from these; where they say nothing either, none is added (readers then take the rank: a scale of 1). Raises
    AdapterError for tensors of another form than their names say.
    """
    renamed = {our_name(name): tensor for name, tensor in tensors.items()}
    check_forms(renamed)
    found = _ia3(renamed)
    for name in [name for name in found if name.endswith(f".{MAGNITUDE}") and name not in tensors]:
        found[name] = _as_column(found[name], found.get(f"{name.removesuffix(MAGNITUDE)}{DOWN}"))
    parts = _parts(metadata, settings)
    if parts:
        found.update(_alphas(found, parts))
    return found


def read_any(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_lora` for a file of any program: tensors under our names, with their alphas, and the file's metadata."""
    tensors, metadata = read_lora(path)
    return in_our_names(tensors, metadata, peft_settings(Path(path))), metadata


def peft_settings(path: Path) -> dict[str, object] | None:
    """PEFT's settings beside one of its files, None where there are none. Raises AdapterError when unreadable."""
    beside = path.with_name(PEFT_SETTINGS)
    if path.name != PEFT_FILE or not is_file(beside):
        return None
    try:
        return read_object(beside)
    except JsonError as error:
        raise AdapterError(f"{beside.name} beside {path.name} {error}. Get it again.") from error


def our_name(name: str) -> str:
    """A tensor's name with what follows the layer in our spelling; the layer stays as the file calls it."""
    name = _WRAPPED.sub("", name)
    for pattern, layer in ((_PROCESSOR, ".to_{0}"), (_TEXT_ATTENTION, ".self_attn.{0}_proj")):
        old = pattern.search(name)
        if old:
            which, side = old.groups()
            if which == "out" and pattern is _PROCESSOR:
                which = "out.0"
            return f"{name[: old.start()]}{layer.format(which)}.lora_{side}.weight"
    for pattern, tail in _TAILS:
        if pattern.search(name):
            return pattern.sub(tail, name)
    return name


def _as_column(lengths: Tensor, down: Tensor | None) -> Tensor:
    """PEFT's magnitudes, one for each output, in the shape of a weight with one input."""
    return lengths.reshape(-1, *(1,) * ((2 if down is None else down.ndim) - 1))


def _ia3(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's IA³ multiplies by l, kohya's by 1 + w; l is a column (out, 1), or a row (1, in) where it scales inputs."""
    found = {}
    for name, tensor in tensors.items():
        head, dot, tail = name.rpartition(".ia3_l")
        if not dot or tail:
            found[name] = tensor
            continue
        found[f"{head}.weight"] = (tensor.float() - 1).flatten()
        found[f"{head}.on_input"] = torch.tensor(int(tensor.shape[0] == 1))
    return found


def _parts(metadata: Mapping[str, str], settings: Mapping[str, object] | None) -> dict[str, Mapping[str, object]]:
    """PEFT's settings by the prefix of the layers they are for ("" = all)."""
    if settings is not None:
        return {"": settings}
    try:
        flat = parse(metadata.get(DIFFUSERS_KEY, "{}"))
    except JsonError:
        return {}
    found: dict[str, dict[str, object]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        part, _, field = key.partition(".")
        found.setdefault(f"{part}.", {})[field] = value
    return dict(found)


def _alphas(tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, object]]) -> dict[str, Tensor]:
    """An alpha for every LoRA that has none; PEFT's alpha / sqrt(r) becomes alpha·sqrt(r) / r."""
    made = {}
    for name, tensor in tensors.items():
        head, tail = _layer_of(name)
        if not tail or f"{head}.alpha" in tensors or f"{head}.alpha" in made:
            continue
        found = next(((prefix, given) for prefix, given in parts.items() if head.startswith(prefix)), None)
        if found is None:
            continue
        prefix, settings = found
        alpha = settings.get("lora_alpha", settings.get("alpha"))
        alpha = _by_pattern(settings.get("alpha_pattern"), head.removeprefix(prefix), alpha)
        if isinstance(alpha, (int, float)) and 0 < abs(alpha) <= LARGEST_ALPHA:
            rank = tensor.shape[RANK_AXES[tail]]
            rooted = math.sqrt(rank) if settings.get("use_rslora") else 1.0
            made[f"{head}.alpha"] = torch.tensor(float(alpha) * rooted)
    return made


def _layer_of(name: str) -> tuple[str, str]:
    """(layer, tensor) of the tensors that tell a rank; ("", "") for the others."""
    for tail in RANK_AXES:
        if name.endswith(f".{tail}"):
            return name[: -len(tail) - 1], tail
    return "", ""


def _by_pattern(patterns: object, layer: str, otherwise: object) -> object:
    """PEFT's `alpha_pattern`: the value of the first expression that is the layer's path or an end of it."""
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            with contextlib.suppress(re.error):
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    return value
    return otherwise
