"""The instant map as the start of a training: the adapter begins with the closed-form answer."""

from __future__ import annotations

import time

from ..modes.base import Settings
from ..modes.ileco import own_anchors
from ..modes.instant import InstantParams, install, preserved, solve
from ..modes.prompts import prompt_pairs
from ..params.core import Task
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.network import NetworkOptions
from ..params.rules import Rule
from .base import STAGES, Preparation, Stage


def without_prompts(job: Job, mode: ModeInfo) -> str:
    """An instant start in a mode that has no pairs of prompts."""
    if job[NetworkOptions].network_init != "instant" or "instant" in mode.needs:
        return ""
    return f"needs an original and a target prompt to solve for; mode {job[Task].mode} has none. Choose another start."


def without_a_word(job: Job, mode: ModeInfo) -> str:
    """An instant start for an original prompt that is empty: there is no word whose meaning could change."""
    instant = job[NetworkOptions].network_init == "instant" and "instant" in mode.needs and mode.name != "Instant"
    originals, targets = prompt_pairs(job)
    if not instant or all(originals) or originals == targets:  # two empty prompts are told of elsewhere
        return ""
    return "has an empty line, and network_init instant changes the meaning of words; name them, or choose default."


@STAGES.register("instant")
class InstantStart(Stage):
    """UCE or SPEED for the job's pairs, written into the adapter before the first step."""

    help = "Starts from the closed-form answer of the prompt pairs."
    rules = (
        Rule(("network_init", "mode"), without_prompts),
        Rule(("original_prompt", "network_init", "mode"), without_a_word, complete=True),
    )

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        return settings[NetworkOptions].network_init == "instant"

    def prompts(self) -> tuple[str, ...]:
        """What is preserved: the own list, else iLECO's anchors, else the built-in one."""
        anchors = own_anchors(self.settings)
        if anchors and not self.settings[InstantParams].instant_preserve.strip():
            return ("", *anchors)
        return ("", *preserved(self.settings, prompt_pairs(self.settings)[0]))

    def prepare(self, at: Preparation) -> None:
        """Nothing when resumed: the adapter is restored."""
        if at.resumed:
            return
        began = time.perf_counter()
        edit = solve(self.settings, prompt_pairs(self.settings), self.prompts(), at.kit, at.model)
        install(edit, at.network, at.tell)
        at.tell(f"network_init instant: {len(edit.edited)} embeddings edited in {time.perf_counter() - began:.2f} s.")
