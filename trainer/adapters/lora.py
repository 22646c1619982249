"""LoRA on linear and 1×1 convolution layers (2106.09685), and LoCon: also the convolutions of the residual blocks."""

from __future__ import annotations

from ..contracts import Layer
from ..params.core import Network
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.network import NetworkOptions
from ..params.rules import Rule
from .base import ADAPTERS, AdapterSpec
from .difference_start import DifferenceStart
from .dora import DORA_RULES, Decomposed, DoraOptions
from .file_delta import ALPHA, DOWN, MAGNITUDE, MID, UP
from .plain_lora import Convolved
from .timesteps import RULES as TIMESTEP_RULES
from .timesteps import TimestepOptions, TimestepRanks
from .tucker import TuckerOptions
from .where import ignores, in_any_block


def tucker_start(job: Job, mode: ModeInfo) -> str:
    """A start that is given as two matrices, for kernels kept in three parts."""
    init, kind = job[NetworkOptions].network_init, job[Network].network_type
    if init == "default" or not job[TuckerOptions].network_tucker or ADAPTERS.canonical(kind) != "c3lier":
        return ""
    return f"cannot begin as network_init {init}; switch one of the two off."


@ADAPTERS.register("lierla", "lora")
class Lierla(Decomposed, TimestepRanks, DifferenceStart):
    """LoRA on the linear layers and 1×1 convolutions of transformer blocks and text encoders."""

    help = "Plain LoRA on the attention blocks: small, fast, read by every WebUI. Rank 4 to 128."
    needs = frozenset({"dora", "dora_axis", "timestep_rank"})
    sections = (DoraOptions, TimestepOptions)
    rules = (*TIMESTEP_RULES, *DORA_RULES, *ignores("lierla", "network_conv_rank", "network_conv_alpha"))
    file_tensors = (DOWN, UP, ALPHA, MAGNITUDE)
    exact = frozenset({ALPHA, MAGNITUDE})


@ADAPTERS.register("c3lier", "locon")
class Locon(Decomposed, TimestepRanks, DifferenceStart, Convolved):
    """LoRA also on the convolutions, samplers and time projections of the UNet."""

    help = "LoRA on the convolutions too (LoCon): also learns textures and style. Rank up to 64, alpha 1 or less."
    needs = frozenset({"dora", "dora_axis", "timestep_rank", "tucker"})
    sections = (DoraOptions, TimestepOptions, TuckerOptions)
    rules = (*TIMESTEP_RULES, *DORA_RULES, Rule(("network_tucker", "network_init"), tucker_start))
    file_tensors = (DOWN, UP, MID, ALPHA, MAGNITUDE)
    exact = frozenset({ALPHA, MAGNITUDE})

    @classmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        return in_any_block(layer)

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        return {"conv_dim": str(spec.rank_of("conv3x3")), "conv_alpha": str(spec.alpha_of("conv3x3"))}
