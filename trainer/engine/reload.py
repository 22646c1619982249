"""A written file put back onto a model, as its user would: the file alone says what was learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..adapters.base import AdapterSpec, Strength
from ..adapters.choose import spelled, split_name
from ..adapters.file import read_lora
from ..adapters.file_delta import DOWN, plain_layers, rank_of
from ..adapters.metadata import baked_strength
from ..adapters.network import Network
from ..adapters.plain_lora import Lora
from ..errors import AdapterError
from ..events import EventLog
from ..models.base import Model
from ..models.layers import layers_of
from ..params.job import Job
from .build import make_network
from .passes import plan_passes


def written_network(job: Job, model: Model, path: Path, log: EventLog) -> Network:
    """The adapter that a job wrote, filled from its file, not yet attached.

    A file of nothing but plain LoRA gives plain LoRAs on the layers that it names, whatever was trained; any other the
    adapter of the job's last pass. Raises AdapterError when the file leaves a module of the adapter empty.
    """
    tensors, metadata = read_lora(path)
    plain = plain_layers(tensors)
    if plain is None:
        network = make_network(plan_passes(job)[-1].job, model, 0, log)
    else:
        network = plain_network(model, {f"{layer}.{DOWN}": rank_of(own) for layer, own in plain.items()})
    if network.load(tensors, baked=baked_strength(metadata)).matched != len(network):
        raise AdapterError(f"{path.name} does not fill every module of the adapter it was written from.")
    return network


def plain_network(model: Model, ranks: dict[str, int]) -> Network:
    """Empty plain LoRAs of these ranks on the layers that they name. Raises AdapterError when there is none."""
    layers = {layer.key: layer for layer in layers_of(model)}
    table = spelled((layer.key, layer.also) for layer in layers.values())
    named = {found[0]: rank for name, rank in ranks.items() if (found := split_name(name, table))}
    if not named:
        raise AdapterError("The file names no layer of this model: it was made for another kind of base model.")
    strength, generator = Strength(), torch.Generator().manual_seed(0)
    spec = AdapterSpec("lierla", rank=max(named.values()), alpha=float(max(named.values())))
    own = {key: dataclasses.replace(spec, rank=rank, alpha=float(rank)) for key, rank in named.items()}
    adapters = [Lora(layers[key], spec, strength, generator) for key, spec in own.items()]
    return Network(adapters, spec, strength).to(model.device)
