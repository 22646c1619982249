"""All modes but LoRA on the painted world: what learns from words, and what learns from pairs of pictures."""

from __future__ import annotations

from pathlib import Path

from . import concepts, pairs
from .before import Before
from .scenario import Scenario, Suite


def prepare(folder: Path) -> None:
    """Draw the pairs of pictures below `folder`."""
    pairs.prepare(folder / "pictures")


def scenarios(folder: Path) -> tuple[Scenario, ...]:
    """Every line of docs/lab/modes.md; the pictures of the pairs lie below `folder`."""
    before = Before()
    return (*concepts.scenarios(before), *pairs.scenarios(folder / "pictures", before))


WORDS = ("their shapes changed", "median leak", "noise gap", "steps to 0.8", "seconds to 0.8")
PAIRS = ("cosine", "outside", "seconds to 90%")
SUITE = Suite("modes", prepare, scenarios, frozenset((*WORDS, *PAIRS)))
