"""What of a job has no effect on the model it is run on: only known when that is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from ..adapters.network import Network
from ..models.base import Model
from ..models.layers import layers_of
from ..params import core
from ..params.job import Job
from ..params.network import NetworkOptions, idle_entries, unused_patterns


def idle_here(job: Job, model: Model, network: Network) -> Iterator[str]:
    """Lines to warn with."""
    if job[core.Train].train_loss_weighting == "velocity" and model.process.is_flat("velocity"):
        yield "train_loss_weighting velocity has no effect: the loss of a v-prediction model is weighted so already."
    options = job[NetworkOptions]
    if options.network_name_filter.strip():
        names = [name for layer in layers_of(model) for name in (layer.key, layer.path, *layer.also)]
        for pattern in unused_patterns(options.network_name_filter, names):
            yield f"network_name_filter: {pattern} fits no layer of this model."
    there = {adapter.block for adapter in network}
    for field in ("network_block_ranks", "network_block_alphas", "network_block_lrs"):
        for entry in idle_entries(getattr(options, field), there):
            yield f"{field}: {entry} has no effect, no layer there is trained."
