"""Pairs of prompts: line i of the original prompt with line i of the target, for the modes that learn from words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..params.core import Task, Train
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.rules import Rule


def prompt_pairs(job: Job) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(originals, targets). No target at all removes: it is empty for every line.

    The numbers of lines may differ (a rule refuses that). Of TrainTrain's files each text is one prompt.
    """
    task = job[Task]
    if job.traintrain:
        return (task.original_prompt,), (task.target_prompt,)
    originals = _lines(task.original_prompt)
    targets = _lines(task.target_prompt, len(originals))
    return originals, targets if any(targets) else ("",) * len(originals)


def _lines(text: str, wanted: int = 1) -> tuple[str, ...]:
    """The lines of a field; empty ones at its end count only while fewer than `wanted` stand before them."""
    lines = [line.strip() for line in text.split("\n")]
    while len(lines) > wanted and not lines[-1]:
        lines.pop()
    return tuple(lines)


def written_lines(text: str) -> tuple[str, ...]:
    """The prompts of a field that is a list of them, without its empty lines."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def unrelated(prompts: Iterable[str], originals: Iterable[str]) -> tuple[str, ...]:
    """Those of a built-in list that share no word with what is to change, articles aside."""
    words = {word for original in originals for word in re.findall(r"\w+", original.lower())} - {"a", "an"}
    return tuple(prompt for prompt in prompts if not words & set(prompt.split()))


def _of_words(mode: ModeInfo) -> bool:
    return "prompts" in mode.needs and not mode.needs & {"pictures", "folder"}


def unequal_lines(job: Job, mode: ModeInfo) -> str:
    """Another number of target lines than of original lines."""
    originals, targets = prompt_pairs(job)
    if not _of_words(mode) or len(originals) == len(targets):
        return ""
    return (
        f"has {len(targets)} line(s), the original prompt has {len(originals)}. Line i belongs to line i; write one "
        "target for each, or leave the target prompt empty to remove all of them."
    )


def nothing_changes(job: Job, mode: ModeInfo) -> str:
    """Targets that are the originals."""
    originals, targets = prompt_pairs(job)
    if not _of_words(mode) or originals != targets:
        return ""
    if not any(originals):
        return "is empty and so is the target prompt; write what is to be changed, and into what."
    return "is the same as the target prompt, so nothing would be learned; write what it is to become."


def empty_original(job: Job, mode: ModeInfo) -> str:
    """A line that means every picture."""
    originals, targets = prompt_pairs(job)
    if not _of_words(mode) or all(originals) or originals == targets:
        return ""
    return "has an empty line: the change will affect every image. Name what is to be changed."


def of_the_seed(name: str, what: str, warning: bool = False) -> Rule:
    """A rule against a setting that TrainTrain's own training rule has no place for; only told when a `warning`."""

    def check(job: Job, mode: ModeInfo) -> str:
        if not job.value(name) or not job[Train].train_traintrain_compatible:
            return ""
        return f"has no effect with train_traintrain_compatible, which trains without {what}; switch one of them off."

    return Rule((name, "train_traintrain_compatible"), check, warning=warning)


RULES: tuple[Rule, ...] = (
    Rule(("target_prompt", "original_prompt", "mode"), unequal_lines, complete=True),
    Rule(("original_prompt", "target_prompt", "mode"), nothing_changes, complete=True),
    Rule(("original_prompt", "target_prompt", "mode"), empty_original, warning=True, complete=True),
)
