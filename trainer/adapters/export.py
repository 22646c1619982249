"""What is written: the adapter's own file, or a plain LoRA of the same ΔW, which every WebUI reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import AdapterError
from ..maths.subspace import product_norm, product_svd, truncated_svd
from ..maths.weights import weight_shape
from ..params import core
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.rules import Rule
from .base import ADAPTERS, Adapter
from .dora import axis_args
from .file_delta import ALPHA, DOWN, MAGNITUDE, PLAIN, UP, plain_layers
from .network import Network
from .plain_lora import Lora

FORMATS = ("auto", "lora", "native")
NOTHING, ROUNDING = 1e-12, 1e-5


@dataclass(frozen=True)
class ExportSettings:
    """`format`: auto (a plain LoRA where it is exact or within the limit, else the type's own file), lora, or native.

    `rank` of a plain LoRA; 0 = as trained. `max_error`: largest ‖ΔW − written‖ / ‖ΔW‖ over all layers for auto.
    """

    format: str = "auto"
    rank: int = 0
    max_error: float = 0.05


def _idle(name: str) -> Rule:
    default = core.Export.__dataclass_fields__[name].default

    def check(job: Job, mode: ModeInfo) -> str:
        given, kind = job[core.Export], ADAPTERS.get(job[core.Network].network_type)
        if getattr(given, name) == default:
            return ""
        if given.export_format == "lora":
            return "" if name == "export_rank" else "has no effect with export_format lora, which knows no limit."
        if given.export_format == "native":
            return "has no effect with export_format native, which writes no LoRA of another type."
        if not kind.portable or (job.value("use_dora") and "dora" in kind.tags()):
            return ""
        own = f"network_type {job[core.Network].network_type}, whose own file every WebUI reads"
        return f"has no effect with {own}. Set export_format to lora for a plain LoRA."

    return Rule((name, "export_format", "network_type"), check, warning=True)


RULES = (_idle("export_rank"), _idle("export_max_error"))
"""Warnings of settings of a plain LoRA where none will be written."""


@dataclass(frozen=True)
class Exported:
    """The tensors of a file, what its metadata says of the network, and what the user should be told (or "").

    `form` is lora or native; `error` is relative, over all layers; `facts` are keyword arguments of `FileFacts`.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, object]
    form: str = "native"
    error: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class _Approximation:
    """Plain LoRA factors of one layer, balanced, at scale 1: `error` and `size` are ‖ΔW − U·D‖ and ‖ΔW‖."""

    down: Tensor
    up: Tensor
    error: float
    size: float


@torch.no_grad()
def export_network(
    network: Network, dtype: torch.dtype | None, strength: float, settings: ExportSettings | None = None
) -> Exported:
    """The file of a network, ΔW multiplied by `strength` once; `dtype` None keeps the precision trained in.

    Raises AdapterError for strength 0.
    """
    settings = settings or ExportSettings()
    own, names = _own_error(network), {name for adapter in network for name in adapter.tensors()}
    plain = names <= PLAIN
    portable = plain or (ADAPTERS.get(network.spec.type).portable and MAGNITUDE not in names)
    if settings.format == "native" or (plain and settings.rank in (0, network.spec.rank)):
        return _as_it_is(network, dtype, strength, own, _said(own, settings))
    if portable and not plain and settings.format == "auto":
        return _as_it_is(network, dtype, strength)
    if why := _no_lora(network):
        return _as_it_is(network, dtype, strength, message=f"{why} It was written in its own format.")
    if strength == 0.0:
        raise AdapterError("network_strength = 0 would write a LoRA file that does nothing. Choose another.")
    layers = {adapter.key: approximate(adapter, settings.rank or adapter.rank) for adapter in network}
    error = max(_over_all(layers), own)
    if settings.format == "auto" and error > settings.max_error:
        return _as_it_is(network, dtype, strength, own, _too_far(network, error, portable, settings))
    tensors = {}
    for key, layer in sorted(layers.items()):
        tensors.update(_file_tensors(network[key], layer, strength, dtype))
    return Exported(tensors, _lora_facts(network, settings, error), "lora", error, _said(error, settings))


@torch.no_grad()
def approximate(adapter: Adapter, rank: int) -> _Approximation:
    """The best plain LoRA of one layer: its own factors where it has some of that rank, else an SVD of ΔW."""
    factors = adapter.as_lora()
    if factors is None:
        delta = adapter.delta().flatten(1)
        u, s, v = truncated_svd(delta, rank)
        size, rest = float(delta.norm()), float((delta - (u * s) @ v).norm())
        return _Approximation(*_balanced(u, s, v), rest if rest > ROUNDING * size else 0.0, size)
    down, up = factors.down.float().flatten(1), factors.up.float() * factors.scale
    u, s, v = product_svd(down, up)
    error = float(s[rank:].norm())
    return _Approximation(*_balanced(u[:, :rank], s[:rank], v[:rank]), error, float(product_norm(down, up)))


def _balanced(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """√σ on both sides, so that neither factor leaves the range of fp16."""
    root = s.sqrt()
    return root[:, None] * v, u * root


def _file_tensors(
    adapter: Adapter, layer: _Approximation, strength: float, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    shape = weight_shape(adapter.module)
    tail = (1,) * (len(shape) - 2)
    root, wanted = math.sqrt(abs(strength)), dtype or next(adapter.parameters()).dtype
    down, up = layer.down * root, layer.up * math.copysign(root, strength)
    wide = {DOWN: down.view(-1, *shape[1:]), UP: up.reshape(*up.shape, *tail)}
    named = {name: tensor.to("cpu", wanted) for name, tensor in wide.items()}
    named[ALPHA] = torch.tensor(float(len(layer.down)))
    return {f"{adapter.key}.{name}": tensor.clone().contiguous() for name, tensor in named.items()}


def _over_all(layers: Mapping[str, _Approximation]) -> float:
    error = sum(layer.error**2 for layer in layers.values()) ** 0.5
    size = sum(layer.size**2 for layer in layers.values()) ** 0.5
    return error / size if size > NOTHING else 0.0


def _own_error(network: Network) -> float:
    """What types lose whose forward is no matrix (routed experts), over all layers; 0 for the others."""
    errors = [(factors.error, float(adapter.delta_norm())) for adapter in network if (factors := adapter.as_lora())]
    size = sum(size**2 for _, size in errors) ** 0.5
    return sum((error * size) ** 2 for error, size in errors) ** 0.5 / size if size > NOTHING else 0.0


def _no_lora(network: Network) -> str:
    """Why this network has no plain LoRA at any rank, "" when it has one."""
    kind = network.spec.type
    if any(len(weight_shape(adapter.module)) < 2 for adapter in network):
        return f"network_type {kind} changes numbers that a LoRA does not reach."
    biases = [adapter.delta_bias() for adapter in network]
    if any(bias is not None and bool(bias.any()) for bias in biases):
        return f"network_type {kind} has learned biases, for which a LoRA has no place."
    return ""


def _as_it_is(
    network: Network, dtype: torch.dtype | None, strength: float, error: float = 0.0, message: str = ""
) -> Exported:
    tensors = network.export(dtype, strength)
    form = "native" if plain_layers(tensors) is None else "lora"
    facts: dict[str, object] = {**network.file_facts(), "export": _noted(network, form, error)}
    if any(name.endswith(MAGNITUDE) for name in tensors):
        facts["network_args"] = {**cast("dict[str, str]", facts["network_args"]), **axis_args(network.spec)}
    return Exported(tensors, facts, form, error, message)


def _lora_facts(network: Network, settings: ExportSettings, error: float) -> dict[str, object]:
    rank, facts = settings.rank or network.spec.rank, network.file_facts()
    args = cast("dict[str, str]", facts["network_args"])
    plain = {"network_type": "lierla", "network_module": Lora.network_module, "network_rank": rank}
    more = {"network_alpha": float(rank), "network_args": {**args, "type": network.spec.type}}
    return {**facts, **plain, **more, "export": _noted(network, "lora", error)}


def _noted(network: Network, form: str, error: float) -> dict[str, str]:
    """What every metadata level says of the export; nothing for a LoRA that was trained as one."""
    kind = ADAPTERS.canonical(network.spec.type)
    if kind in ("lierla", "c3lier") and form == "lora" and not error:
        return {}
    return {"atelier_network_type": kind, "atelier_export_format": form, "atelier_export_error": f"{error:.4g}"}


def _said(error: float, settings: ExportSettings) -> str:
    limit = f", more than export_max_error ({settings.max_error:.1%}) allows" if error > settings.max_error else ""
    return f"Written as a plain LoRA, which differs from what was trained by {error:.2%}{limit}." if error else ""


def _too_far(network: Network, error: float, portable: bool, settings: ExportSettings) -> str:
    rank = settings.rank or network.spec.rank
    unsure = "" if portable else ", which not every WebUI reads"
    kept = f"the file is what network_type {network.spec.type} writes{unsure}"
    return (
        f"As a plain LoRA of rank {rank} it would differ from what was trained by {error:.1%}, more than"
        f" export_max_error ({settings.max_error:.1%}) allows: {kept}. Raise export_rank, or set export_format to lora."
    )
