"""Random numbers as a pure function of a key.

Every draw of a run is keyed by what it is for and by (seed, step, global sample index). Nothing depends on the order of
drawing, on the device or on the number of processes, and a resumed run needs no generator state for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`; equal keys give equal numbers on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: Sequence[int], purpose: str, seed: int, step: int, indices: Sequence[int]) -> Tensor:
    """Standard normal numbers (len(indices), *shape), float32, one independent stream per global sample index."""
    return torch.stack([torch.randn(*shape, generator=generator(purpose, seed, step, index)) for index in indices])


def strata(count: int, seed: int, places: Sequence[int]) -> Tensor:
    """Which of `count` strata the samples at these places of a run fall into, int64: every stratum once in each block
    of `count` consecutive places, in an order of the block's own.
    """
    orders = {
        block: torch.randperm(count, generator=generator("strata", seed, block))
        for block in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def uniform(purpose: str, seed: int, step: int, indices: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), shape (len(indices),), float64."""
    draws = [torch.rand((), generator=generator(purpose, seed, step, index), dtype=torch.float64) for index in indices]
    return torch.stack(draws)
