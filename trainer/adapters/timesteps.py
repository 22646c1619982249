"""T-LoRA: the noisier the picture, the fewer ranks are trained (2507.05964)."""

from __future__ import annotations

from dataclasses import dataclass

from ..params import core
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .dora import DoraOptions


@dataclass(frozen=True)
class TimestepOptions:
    """What plain LoRA and LoCon add to the table for T-LoRA."""

    network_timestep_rank: int = param(
        0,
        "Ranks trained at the noisiest timestep; more take part with less noise (T-LoRA, against overfitting). 0 is"
        " off.",
        "option",
        needs="timestep_rank",
        low=0,
        high=1024,
    )


def below_the_rank(job: Job, mode: ModeInfo) -> str:
    """A lowest rank that is none, or that comes together with DoRA."""
    lowest, rank = job[TimestepOptions].network_timestep_rank, job[core.Network].network_rank
    if lowest > rank:
        return f"is above network_rank ({rank}); write at most {rank}."
    if lowest and job[DoraOptions].use_dora:
        return "does not go together with use_dora, whose lengths are those of the whole adapter; set it to 0."
    return ""


RULES = (Rule(("network_timestep_rank", "network_rank", "use_dora"), below_the_rank),)
