"""What an adapter learned, put into the weights of its layers for a while: a forward then costs what the bare one
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .network import Network


@contextmanager
def folded(network: Network, strength: float = 1.0) -> Iterator[None]:
    """Inside the block the layers hold W + strength·ΔW and the network itself is off, attached or not; after it every
    weight is bit for bit as before. Nothing is learned inside.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad(), network.at_strength(0.0):
            for adapter in network:
                weight, bias = adapter.module.weight, adapter.module.bias
                for values, change in ((weight, adapter.delta()), (bias, adapter.delta_bias())):
                    if isinstance(values, Tensor) and change is not None:
                        kept.append((values, values.clone()))
                        values.add_(strength * change.to(values.device, values.dtype))
        with network.at_strength(0.0):
            yield
    finally:
        with torch.no_grad():
            for values, before in reversed(kept):
                values.copy_(before)
