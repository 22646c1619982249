"""A written file put back onto a model, as its user would: the file alone says what was learned."""

from __future__ import annotations

from pathlib import Path

from ..adapters.file import read_lora
from ..adapters.metadata import baked_strength
from ..adapters.network import Network
from ..errors import AdapterError
from ..events import EventLog
from ..models.base import Model
from ..params.job import Job
from .build import make_network


def written_network(job: Job, model: Model, path: Path, log: EventLog) -> Network:
    """The adapter of the job, filled from the file it wrote, not yet attached.

    Raises AdapterError when the file leaves a module of the job's adapter empty.
    """
    network = make_network(job, model, 0, log)
    tensors, metadata = read_lora(path)
    if network.load(tensors, baked=baked_strength(metadata)).matched != len(network):
        raise AdapterError(f"{path.name} does not fill every module of the adapter it was written from.")
    return network
