"""A written file put back onto a model, as its user would: the file alone says what was learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.base import ADAPTERS, AdapterSpec, Strength
from ..adapters.choose import spelled, split_name
from ..adapters.factored import Factored
from ..adapters.file import read_lora
from ..adapters.lora import DOWN, MID, Lora
from ..adapters.metadata import baked_strength
from ..adapters.network import Network
from ..adapters.tucker import TuckerOptions
from ..errors import AdapterError
from ..events import EventLog
from ..models.base import Model
from ..models.layers import layers_of
from ..params import core
from ..params.job import Job
from ..params.network import DIFFERENCE_INITS, NetworkOptions
from .build import make_network
from .passes import plan_passes


def written_network(job: Job, model: Model, path: Path, log: EventLog) -> Network:
    """The adapter of the job's last pass, filled from the file it wrote, not yet attached.

    A file that was written as plain LoRA gives plain LoRAs on the layers it names, whatever the job's adapter type; so
    does one of a start that is counted from, which has twice the rank, and one whose Tucker cores were multiplied out.
    Raises AdapterError when the file leaves a module of the adapter empty.
    """
    job = plan_passes(job)[-1].job
    tensors, metadata = read_lora(path)
    kind = ADAPTERS.get(job[core.Network].network_type)
    factored = issubclass(kind, Factored) or not issubclass(kind, Lora)
    converted = metadata.get("atelier_export_format") == "lora" and factored
    counted = job[NetworkOptions].network_init in DIFFERENCE_INITS & kind.inits
    coreless = job[TuckerOptions].network_tucker and issubclass(kind, Lora) and not any(MID in name for name in tensors)
    network = plain_network(model, tensors) if converted or counted or coreless else make_network(job, model, 0, log)
    if network.load(tensors, baked=baked_strength(metadata)).matched != len(network):
        raise AdapterError(f"{path.name} does not fill every module of the adapter it was written from.")
    return network


def plain_network(model: Model, tensors: Mapping[str, Tensor]) -> Network:
    """Plain LoRAs of the file's ranks on the layers that it names, empty. Raises AdapterError when it names none."""
    layers = {layer.key: layer for layer in layers_of(model)}
    table = spelled((layer.key, layer.also) for layer in layers.values())
    ranks = {}
    for name, tensor in tensors.items():
        key, rest = split_name(name, table) or ("", "")
        if rest == DOWN:
            ranks[key] = len(tensor)
    if not ranks:
        raise AdapterError("The file names no layer of this model: it was made for another kind of base model.")
    strength, generator = Strength(), torch.Generator().manual_seed(0)
    spec = AdapterSpec("lierla", rank=max(ranks.values()), alpha=float(max(ranks.values())))
    own = (dataclasses.replace(spec, rank=rank, alpha=float(rank)) for rank in ranks.values())
    adapters = [Lora(layers[key], spec, strength, generator) for key, spec in zip(ranks, own, strict=True)]
    return Network(adapters, spec, strength).to(model.device)
