"""Files of shared bases: what the `basis` tool makes from a folder of LoRAs, and the layout of sd-scripts' fork.

Ours: `<layer>.basis_down` (k, in) and `<layer>.basis_up` (out, k), orthonormal, most important first, and
`<layer>.basis_mean` (k, k), the collection's mean ΔW in them; metadata `atelier_basis`. The fork's (its
extract_universal_lora script): `<layer>.lora_down.weight.basis` (in, k) and `.mean` (in), the same of lora_up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Layer
from ..errors import AdapterError, brief
from ..maths.weights import weight_matrix
from ..paths import expanded, is_file
from .checked import taken
from .file import read_lora

MARK, VERSION = "atelier_basis", "1"
DOWN, UP, MEAN = "basis_down", "basis_up", "basis_mean"
_FORK = ".lora_down.weight.basis"


@dataclass(frozen=True)
class Basis:
    """Of one layer: D (k, in) with orthonormal rows, U (out, k) with orthonormal columns, the mean's core (k, k)."""

    down: Tensor
    up: Tensor
    mean: Tensor


def read_basis(path: str, layers: Iterable[Layer]) -> dict[str, Basis]:
    """The bases a file has for these layers, by key. Raises AdapterError when it has none or is no such file."""
    place = expanded(path)
    if not is_file(place):
        raise AdapterError(
            f"basis_path = {place.name!r}: there is no such file, and the adapter cannot begin without it. Put it back"
            f" as {place}, or start a job without basis_path."
        )
    tensors, metadata = read_lora(place)
    fork = any(name.endswith(_FORK) for name in tensors)
    if not fork and metadata.get(MARK) != VERSION:
        raise AdapterError(
            f"basis_path = {place.name!r}: this is not a file of bases. Make one from a folder of LoRAs with the basis"
            " tool, or leave it empty to use the model's own directions."
        )
    made = _of_fork(tensors, place.name) if fork else _ours(tensors, place.name)
    found = {}
    for layer in layers:
        names = (layer.key, *layer.also)
        own = next((made[name] for name in map(plain_name, names) if name in made), None)
        if own is not None and (own.up.shape[0], own.down.shape[1]) == weight_matrix(layer.module):
            found[layer.key] = own
    if not found:
        raise AdapterError(
            f"basis_path = {place.name!r}: none of its {len(made)} layers fits a layer that is trained here. It was"
            " made from LoRAs for another kind of base model; leave it empty to use the model's own directions."
        )
    return found


def plain_name(name: str) -> str:
    """A layer's name without its spelling: kohya's, PEFT's and the fork's names of one layer become the same."""
    flat = name.replace(".", "_").removeprefix("lora_")
    for before, after in (("text_encoder_2_", "te2_"), ("text_encoder_", "te1_"), ("te_", "te1_")):
        if flat.startswith(before):
            return after + flat[len(before) :]
    return flat


def _ours(tensors: Mapping[str, Tensor], file: str) -> dict[str, Basis]:
    names = [name.rpartition(".")[0] for name in tensors if name.endswith(f".{DOWN}")]
    found = {}
    for name in names:
        basis = Basis(*(taken(tensors, f"{name}.{part}", 2, file) for part in (DOWN, UP, MEAN)))
        if not basis.down.shape[0] == basis.up.shape[1] == basis.mean.shape[0] == basis.mean.shape[1]:
            raise AdapterError(f"{file}: the bases of {brief(name)} have different sizes. Make the file again.")
        found[plain_name(name)] = basis
    return found


def _of_fork(tensors: Mapping[str, Tensor], file: str) -> dict[str, Basis]:
    """Its principal components and means; the mean comes first, because it holds most of what its LoRAs share."""
    found = {}
    for name in (name.removesuffix(_FORK) for name in tensors if name.endswith(_FORK)):
        if f"{name}.lora_up.weight.basis" not in tensors:
            continue
        sides = {}
        for side in ("down", "up"):
            head = f"{name}.lora_{side}.weight"
            mean, components = taken(tensors, f"{head}.mean", 1, file), taken(tensors, f"{head}.basis", 2, file)
            if len(mean) != len(components):
                raise AdapterError(f"{file}: {brief(head)} has a mean and a basis of two sizes. Make the file again.")
            sides[side] = mean, torch.linalg.qr(torch.cat([mean[:, None], components], dim=1)).Q
        (mean_down, down), (mean_up, up) = sides["down"], sides["up"]
        count = min(down.shape[1], up.shape[1])
        down, up = down[:, :count].T.contiguous(), up[:, :count].contiguous()
        found[plain_name(name)] = Basis(down, up, torch.outer(up.T @ mean_up, down @ mean_down))
    return found
