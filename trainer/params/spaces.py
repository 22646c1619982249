"""Settings of Null-LoRA, which its adapter and the stage that looks at the inputs of its layers both read."""

from __future__ import annotations

from dataclasses import dataclass

from .core import Network
from .field import ModeInfo, param
from .job import Job
from .rules import Rule, without_effect


@dataclass(frozen=True)
class NullParams:
    """What Null-LoRA adds to the table."""

    network_null_space: str = param(
        "weights",
        "Directions of the frozen halves: the null space of the weights, or those unused for ordinary prompts"
        " (activations), which preserves these best.",
        "option",
        needs="null",
        choices=("weights", "activations"),
    )
    network_null_prompts: str = param(
        "",
        "Prompts that must not change, one per line, for network_null_space activations. Empty takes a built-in list.",
        "option",
        needs="null",
        holds="lines",
    )


def two_ranks(job: Job, mode: ModeInfo) -> str:
    """A rank that cannot be halved."""
    network = job[Network]
    if network.network_type != "null" or network.network_rank > 1:
        return ""
    return "is too small for network_type null, which trains one half of the rank on each side; write 2 or more."


NULL_RULES = (
    Rule(("network_rank", "network_type"), two_ranks),
    without_effect("network_null_space", "network_null_prompts", on="activations"),
)


@dataclass(frozen=True)
class ExpertParams:
    """What the mixture of experts adds to the table."""

    num_experts: int = param(
        4, "Up matrices mixed in every layer; 4 is usual.", "option", needs="experts", low=1, high=64
    )
    network_routing: str = param(
        "constant",
        "What sets the gates: learned numbers (constant), or the input, faded out towards the end (input; slower).",
        "option",
        needs="experts",
        choices=("constant", "input"),
    )
    network_routing_balance: float = param(
        0.01,
        "Weight of the balancing loss, which keeps routing by the input from using few experts only.",
        "option",
        needs="experts",
        low=0,
        high=100,
    )
    enable_effilora: bool = param(
        False,
        "Train a mixture of experts; the same as network_type experts.",
        "option",
        implies=("network_type", "experts"),
    )


EXPERT_RULES = (without_effect("network_routing", "network_routing_balance", on="input"),)
