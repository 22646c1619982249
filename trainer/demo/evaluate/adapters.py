"""Adapter types on the demonstration's task: a new shape from twelve pictures, at five learning rates each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ...adapters.file import read_lora
from ...places import BASE_PICTURES, ROOT
from .. import world
from ..effect import SETTINGS, concept_scenes, unrelated_scenes
from ..measure import Rate, agreement, ask, share
from .scenario import Figures, Goal, Scenario, Suite, Trained

GOAL = 0.8  # of the asked pictures show the new shape
CHECKS = (50, 100)  # steps at which an intermediate file is measured too
ASKED, UNRELATED = 50, 100
RATES = (0.3, 0.6, 1.0, 1.7, 3.0)  # times the shipped learning rate

# Label: what differs from the demonstration's preset.
VARIANTS: dict[str, Mapping[str, object]] = {
    "lierla (plain LoRA)": {},
    "c3lier (LoCon)": {"network_type": "c3lier"},
}


def scenarios(folder: Path) -> tuple[Scenario, ...]:
    """One scenario per variant."""
    shipped = json.loads((ROOT / "presets" / "demo.json").read_text(encoding="utf-8"))
    common = {**shipped, "lora_data_directory": str(BASE_PICTURES), "save_per_steps": CHECKS[0]}
    return tuple(_scenario(label, {**common, **changes}) for label, changes in VARIANTS.items())


def _scenario(label: str, job: Mapping[str, object]) -> Scenario:
    shipped = float(str(job["train_learning_rate"]))
    return Scenario(
        task="a new shape from twelve pictures",
        variant=label,
        job=job,
        measure=measure,
        value=lambda figures: figures["asked"] - 2 * max(0.0, figures["worst fall"] - 0.02),
        rates=tuple(float(f"{shipped * factor:.2g}") for factor in RATES),
        goals=(Goal("asked", low=GOAL), Goal("worst fall", high=0.05)),
    )


def measure(trained: Trained) -> Figures:
    """Success, forgetting, size and how soon the goal was reached."""
    asked = asked_rate(trained)
    others = unrelated_scenes(UNRELATED)
    prompts = [world.caption(scene) for scene in others]
    after = agreement(others, ask(trained.model, prompts, SETTINGS))
    with trained.network.at_strength(0.0):
        before = agreement(others, ask(trained.model, prompts, SETTINGS))
    fall = max(before[name].value - after[name].value for name in world.ATTRIBUTES)
    reached = steps_to_goal(trained, asked.value)
    return {
        "asked": asked,
        "worst fall": fall,
        "unrelated shape": after["shape"],
        "steps to goal": float(reached),
        "seconds to goal": trained.seconds * reached / max(trained.steps, 1),
        "parameters": float(sum(value.numel() for value in trained.network.parameters())),
        "file KB": trained.path.stat().st_size / 1024,
    }


def asked_rate(trained: Trained) -> Rate:
    """How often prompts with the new word show its shape."""
    prompts = [world.caption(scene) for scene in concept_scenes(ASKED)]
    return share(reading.shape == world.HELD_OUT_SHAPE for reading in ask(trained.model, prompts, SETTINGS))


def steps_to_goal(trained: Trained, final: float) -> float:
    """The first measured step with enough success; infinite when there is none."""
    for step in CHECKS:
        path = trained.path.with_name(f"{trained.path.stem}_{step}steps.safetensors")
        if path.is_file():
            kept = {name: value.clone() for name, value in trained.network.state_dict().items()}
            trained.network.load(read_lora(path)[0])
            good = asked_rate(trained).value >= GOAL
            trained.network.load_state_dict(kept)
            if good:
                return step
    return trained.steps if final >= GOAL else math.inf


SUITE = Suite("adapters", scenarios)
