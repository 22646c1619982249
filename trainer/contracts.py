"""What the packages say to each other: records and protocols that every row may import. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn


class Role(str, Enum):
    """What a layer does in a denoiser or a text encoder, whatever the architecture calls it.

    SELF_* and CROSS_*: queries, keys, values and output of an attention. FF_IN, FF_OUT: the two layers of a
    feed-forward block (a gated one has its gate in FF_IN's second half). PROJECTION: into and out of a transformer.
    CONV: convolutions of residual blocks, their shortcuts too. SAMPLER: down- and upsampling. TIME: takes the time
    embedding in. NORM: a normalisation. MODULATION: scales and shifts by the time (transformers without TIME).
    """

    SELF_Q = "self_q"
    SELF_K = "self_k"
    SELF_V = "self_v"
    SELF_OUT = "self_out"
    CROSS_Q = "cross_q"
    CROSS_K = "cross_k"
    CROSS_V = "cross_v"
    CROSS_OUT = "cross_out"
    FF_IN = "ff_in"
    FF_OUT = "ff_out"
    PROJECTION = "projection"
    CONV = "conv"
    SAMPLER = "sampler"
    TIME = "time"
    NORM = "norm"
    MODULATION = "modulation"


SELF_ATTENTION = frozenset({Role.SELF_Q, Role.SELF_K, Role.SELF_V, Role.SELF_OUT})
CROSS_ATTENTION = frozenset({Role.CROSS_Q, Role.CROSS_K, Role.CROSS_V, Role.CROSS_OUT})
KEYS_AND_VALUES = frozenset({Role.SELF_K, Role.SELF_V, Role.CROSS_K, Role.CROSS_V})
TRANSFORMER = SELF_ATTENTION | CROSS_ATTENTION | {Role.FF_IN, Role.FF_OUT, Role.PROJECTION, Role.MODULATION}
RESIDUAL = frozenset({Role.CONV, Role.SAMPLER, Role.TIME})


class Placed(Protocol):
    """Anything that stands for a layer of a model: the layer, or the adapter on it."""

    @property
    def key(self) -> str: ...

    @property
    def part(self) -> str: ...

    @property
    def role(self) -> Role: ...


@dataclass(frozen=True)
class Layer:
    """A linear, convolutional or normalisation layer that an adapter may sit on.

    `key`: its name in the LoRA files we write. `path`: its module name in diffusers (text: transformers 4) spelling.
    `part`: unet, te1 or te2. `block`: one of the family's blocks. `kind`: its shape: linear, conv1x1, conv3x3,
    groupnorm or layernorm. `role`: what it does. `also`: other spellings of the key in files of other programs.
    """

    key: str
    path: str
    module: nn.Module
    part: str
    block: str
    kind: str
    role: Role
    also: tuple[str, ...] = ()
