"""A folder of LoRAs → the directions they share, layer by layer (2512.05117), for network_type universal.

Each LoRA counts with its ΔW = alpha/rank·U·D, brought to norm 1, never with its factors: how a ΔW is split between U
and D says nothing (any invertible matrix fits between them). LoRAs that began from the same random D still share that
start in their row space, whatever they learned; they are found and count once on that side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.basis_file import DOWN, MARK, MEAN, UP, VERSION, plain_name
from ..adapters.checked import check_forms
from ..adapters.file import checked_name, name_note, read_lora, write_lora
from ..adapters.file_delta import ALPHA, lora_factors
from ..adapters.file_delta import DOWN as LORA_DOWN
from ..adapters.file_delta import UP as LORA_UP
from ..adapters.foreign import our_name
from ..errors import AdapterError
from ..maths.subspace import product_svd, truncated_svd
from ..paths import expanded

LARGEST = 1e18
"""Norm of a ΔW from which on its square is no float32 any more; nothing that was trained comes near."""
ALIKE = 0.5
"""Cosine of two LoRAs' D from which on they began alike: independent starts of a whole model stay below 0.01."""


@dataclass(frozen=True)
class BasisReport:
    """What a collection of LoRAs turned out to be.

    `groups`: names of LoRAs that share one random start. `left_out`: file → why. `explained`: the share of the norm²
    of their ΔW that lies in the bases, `chance` what random directions of that number would hold.
    """

    path: Path
    loras: int
    layers: int
    rank: int
    groups: tuple[tuple[str, ...], ...]
    left_out: Mapping[str, str]
    explained: float
    chance: float


@dataclass(frozen=True)
class _File:
    """An open LoRA: the tensor names of each layer, by `plain_name`."""

    name: str
    handle: Any
    layers: Mapping[str, Mapping[str, str]]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """D (r, in) and U (out, r) of ΔW, the scale on U."""
        own = {part: self.handle.get_tensor(name) for part, name in self.layers[layer].items()}
        down, up, scale, _ = lora_factors({name: tensor.float() for name, tensor in own.items()})
        return down.flatten(1), up * scale


@torch.no_grad()
def make_basis(folder: Path, out: Path, rank: int = 16, tell: Callable[[str], None] = lambda line: None) -> BasisReport:
    """Write the bases of all LoRAs in a folder and its sub-folders. Raises AdapterError when none can be used."""
    folder, out = expanded(folder), checked_name(out, "--out")
    if rank < 1:
        raise AdapterError(f"--rank = {rank}: every layer needs at least 1 direction.")
    paths = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
    if not paths:
        raise AdapterError(f"{folder} holds no .safetensors file. Give the folder with the LoRAs to learn from.")
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        files = [file for path in paths if (file := _opened(path, stack, left_out)) is not None]
        _leave_out_twins(files, left_out)
        if not files:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
            raise AdapterError(f"None of the {len(paths)} files in {folder} can be used ({reasons}).")
        groups = shared_starts(files)
        for group in groups:
            tell(
                f"{', '.join(group)} began from the same random numbers: what their down matrices share says nothing of"
                " what they learned. They count once there."
            )
        tensors, explained, chance = _bases(files, groups, rank, tell)
    for name, why in left_out.items():
        tell(f"{name} was left out: {why}.")
    facts = {MARK: VERSION, "loras": str(len(files)), "rank": str(rank), "explained": f"{explained:.4f}"}
    written = write_lora(out, tensors, facts)
    if written != out:
        tell(name_note(out, written))
    layers = sum(name.endswith(f".{DOWN}") for name in tensors)
    return BasisReport(written, len(files), layers, rank, groups, left_out, explained, chance)


def shared_starts(files: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of LoRAs whose D are alike in all layers they have in common: trained from one random start."""
    group = list(range(len(files)))
    for one in range(len(files)):
        for two in range(one):
            if group[one] != group[two] and likeness(files[one], files[two])[0] >= ALIKE:
                old, new = group[one], group[two]
                group = [new if number == old else number for number in group]
    found: dict[int, list[str]] = {}
    for file, number in zip(files, group, strict=True):
        found.setdefault(number, []).append(file.name)
    return tuple(sorted(tuple(names) for names in found.values() if len(names) > 1))


def likeness(one: Any, two: Any) -> tuple[float, float]:
    """(cosine of the D, cosine of the ΔW) of two LoRAs over the layers where both have the same shapes; 0 without."""
    products = torch.zeros(2, 3, dtype=torch.float64)
    for layer in set(one.layers) & set(two.layers):
        (down_a, up_a), (down_b, up_b) = one.factors(layer), two.factors(layer)
        if down_a.shape == down_b.shape:
            terms = [(a * b).sum() for a, b in ((down_a, down_b), (down_a, down_a), (down_b, down_b))]
            products[0] += torch.stack(terms).cpu().double()
        if down_a.shape[1] == down_b.shape[1] and len(up_a) == len(up_b):
            pairs = ((down_a, up_a, down_b, up_b), (down_a, up_a, down_a, up_a), (down_b, up_b, down_b, up_b))
            terms = [((d @ e.T) * (u.T @ v)).sum() for d, u, e, v in pairs]
            products[1] += torch.stack(terms).cpu().double()
    cosines = [float(p[0]) / math.sqrt(float(p[1] * p[2])) if float(p[1] * p[2]) > 0 else 0.0 for p in products]
    return cosines[0], cosines[1]


def _opened(path: Path, stack: ExitStack, left_out: dict[str, str]) -> _File | None:
    try:
        tensors, _ = read_lora(path)
        check_forms({our_name(name): tensor for name, tensor in tensors.items()})
        handle = stack.enter_context(safe_open(path, framework="pt"))
        names = list(tensors)
    except (AdapterError, SafetensorError, OSError) as error:
        left_out[path.name] = f"it cannot be read ({error})"
        return None
    found: dict[str, dict[str, str]] = {}
    strange: set[str] = set()
    for name in names:
        own = our_name(name)
        ending = next((end for end in (LORA_DOWN, LORA_UP, ALPHA) if own.endswith(f".{end}")), None)
        if ending is None:  # a dora_scale or lora_mid makes another ΔW of the layer than its factors alone
            strange.update(plain_name(own[:place]) for place in range(len(own)) if own[place] == ".")
            continue
        found.setdefault(plain_name(own.removesuffix(f".{ending}")), {})[ending] = name
    whole = {layer: parts for layer, parts in found.items() if LORA_DOWN in parts and LORA_UP in parts}
    layers = {layer: parts for layer, parts in whole.items() if layer not in strange and _paired(tensors, parts)}
    if not layers:
        left_out[path.name] = "it is no plain LoRA"
        return None
    return _File(path.name, handle, layers)


def _paired(tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> bool:
    """Whether D (r, …) and U (out, r, …) of a layer have one rank."""
    return tensors[parts[LORA_DOWN]].shape[0] == tensors[parts[LORA_UP]].flatten(1).shape[1]


def _leave_out_twins(files: list[_File], left_out: dict[str, str]) -> None:
    """Drop LoRAs that are another one of the list over again."""
    for one in range(len(files) - 1, 0, -1):
        twin = next((file for file in files[:one] if likeness(files[one], file)[1] > 0.9999), None)
        if twin is not None:
            left_out[files[one].name] = f"it is the same as {twin.name}"
            del files[one]


def _bases(
    files: Sequence[_File], groups: Sequence[Sequence[str]], rank: int, tell: Callable[[str], None]
) -> tuple[dict[str, Tensor], float, float]:
    """The tensors of the file, and the shares of norm² explained and by chance."""
    later = {name for group in groups for name in group[1:]}
    names = sorted({layer for file in files for layer in file.layers})
    tensors: dict[str, Tensor] = {}
    shares = []
    for layer in names:
        having = [file for file in files if layer in file.layers]
        shapes = {(len(file.factors(layer)[1]), file.factors(layer)[0].shape[1]) for file in having}
        if len(shapes) > 1:
            tell(f"{layer} has different sizes in these LoRAs and was left out: they are for different base models.")
            continue
        try:
            parts = [(file.name, *product_svd(*file.factors(layer))) for file in having]
        except torch.linalg.LinAlgError:
            tell(f"{layer} has numbers too large to be taken apart in one of these LoRAs and was left out.")
            continue
        parts = [(name, u, s, v) for name, u, s, v in parts if 0 < float(s.norm()) < LARGEST]
        if not parts:
            continue
        up = truncated_svd(torch.cat([u * (s / s.norm()) for _, u, s, _ in parts], dim=1), rank)[0]
        rows = [(s / s.norm())[:, None] * v for name, _, s, v in parts if name not in later] or [parts[0][3]]
        down = truncated_svd(torch.cat(rows), rank)[2]
        count = min(up.shape[1], len(down))
        up, down = up[:, :count], down[:count]
        cores = [((up.T @ u) * s) @ (v @ down.T) for _, u, s, v in parts]
        tensors[f"lora_{layer}.{DOWN}"], tensors[f"lora_{layer}.{UP}"] = down.contiguous(), up.contiguous()
        tensors[f"lora_{layer}.{MEAN}"] = torch.stack(cores).mean(0)
        held = [float(core.norm() / s.norm()) ** 2 for core, (_, _, s, _) in zip(cores, parts, strict=True)]
        shares.append((sum(held) / len(held), count**2 / (len(up) * down.shape[1])))
    if not shares:
        raise AdapterError("No layer of these LoRAs can be used: they are for different base models, or all zero.")
    explained, chance = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return tensors, explained, chance
