"""Adapter types on one task of the painted world: a new shape from twelve pictures of it, at five learning rates each.

The job is the suite's own and small, so that a run with its measurement takes less than 20 seconds of one core. Each
variant starts from a shipped preset: its type, options, rank and alpha (ranks cut to what these narrow layers hold) and
its learning rate, which the small world needs FASTER.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ...places import ROOT
from .. import world
from ..effect import concept_scenes
from .forgetting import Meter, at_success
from .scenario import Figures, Goal, Scenario, Suite, Trained

TASK = "a new shape from twelve pictures"
GOAL, HALF = 0.8, 0.5  # of the asked pictures show the new shape: the demonstration's goal, and what is compared at
STEPS, EVERY = 24, 6  # optimizer steps, and how often a file is kept that may have reached the goal
ASKED, UNRELATED = 32, 40
FASTER = 50.0
"""Times a preset's learning rate for 1,000 steps on a full-size model."""
LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)
SIGNS = r"ABM: ([\d.]+)% of the signs agreed before, ([\d.]+)%"

COMMON: Mapping[str, object] = {
    "format": 1, "mode": "LoRA", "network_rank": 16, "network_alpha": 8, "image_size(height, width)": 64,
    "image_buckets_step": 64, "image_min_length": 64, "train_iterations": STEPS, "train_batch_size": 8,
    "train_optimizer": "AdamW", "train_lr_scheduler": "constant", "train_model_precision": "fp32",
    "train_lora_precision": "fp32", "train_VAE_precision": "fp32", "save_precision": "fp32", "network_targets": "unet",
    "train_loss_weighting": "velocity", "save_per_steps": EVERY,
}  # fmt: skip

PROMPTS = "\n".join((
    "", "a small red circle on the left, white background", "a large blue square on the right, grey background",
    "a yellow triangle", "a large green cross on the left", "a purple ring, black background", "a cyan shape on the"
    " right, white background", "a small shape, grey background",
))  # fmt: skip
"""Ordinary prompts of this world, for the methods that look at what the model does with them."""


@dataclass(frozen=True)
class Variant:
    """`preset` gives type, options and rate; `changes` are what is different here; `faster` multiplies the rate.

    `faster` is less than FASTER where a step moves the weights more than one of plain LoRA does: what a preset needs in
    1,000 steps it need not have in a few. One that is not `swept` is tried at this rate alone.
    """

    preset: str = "LoRA"
    changes: Mapping[str, object] = field(default_factory=dict)
    faster: float = FASTER
    swept: bool = True


SAME_LAYERS, ATTENTION, CONVOLUTIONS = ({"network_name_filter": f"*{part}*"} for part in ("attentions", "attn", "conv"))
"""Plain LoRA's layers alone or still fewer, for types whose steps on all of them would take a run over its 20 seconds.
"""
NARROW = {"network_rank": 2, "network_alpha": 1}
"""LoKr's matrices are so small here that its preset's rank leaves them whole; at this one they are split."""
NULL: Mapping[str, object] = {"network_null_prompts": PROMPTS}
LALORA: Mapping[str, object] = {"lalora_prompts": PROMPTS, "lalora_lambda": 30}

VARIANTS: dict[str, Variant] = {
    "lierla (plain LoRA)": Variant(),
    "c3lier (LoCon)": Variant(changes={"network_type": "c3lier"}),
    "null, weights": Variant("Null", faster=15),
    "null, activations": Variant("NullActivations", NULL, faster=15),
    "universal": Variant("Universal", faster=5),
    "experts": Variant("EffiLoRA"),
    "LaLoRA, weight 30": Variant("LaLoRA", LALORA),
    "LaLoRA, weight 3": Variant("LaLoRA", {"lalora_prompts": PROMPTS, "lalora_lambda": 3}),
    "ABM": Variant("ABM", {"abm_steps": 15, "abm_lr": 1e-3}),
    "loha, plain LoRA's layers": Variant("LoRA_LoHa", SAME_LAYERS, faster=20),
    "lokr": Variant("LoRA_LoKr"),
    "lierla + DoRA": Variant("LoRA_DoRA"),
    "oft, plain LoRA's layers": Variant("LoRA_OFT", SAME_LAYERS, faster=10),
    "ia3": Variant("LoRA_IA3", faster=5),
    "glora": Variant("LoRA_GLoRA"),
    "dylora": Variant("LoRA_DyLoRA", {"network_unit": 4}),
    "full": Variant("LoRA_Full"),
    "T-LoRA": Variant("LoRA_T-LoRA", {"network_timestep_rank": 8}),
    "LoRA+": Variant(changes={"loraplus_lr_ratio": 16}, faster=10),
    "rsLoRA": Variant(changes={"network_rslora": True}, faster=10),
    "PiSSA": Variant(changes={"network_init": "pissa"}, faster=10),
    "MiLoRA": Variant(changes={"network_init": "milora"}, faster=10),
    "OLoRA": Variant(changes={"network_init": "olora"}, faster=10),
    "LoRA-GA": Variant(changes={"network_init": "lora_ga"}, faster=10),
    "LoRA-FA": Variant(changes={"network_freeze_down": True}),
    "experts, routed by input": Variant("EffiLoRA", {"network_routing": "input"}),
    "c3lier, tucker": Variant(changes={"network_type": "c3lier", "network_tucker": True}),
    "c3lier + DoRA": Variant("LoRA_DoRA", {"network_type": "c3lier"}),
    "loha + DoRA, plain LoRA's layers": Variant("LoRA_LoHa", {"use_dora": True, **SAME_LAYERS}),
    "loha, tucker, convolutions": Variant("LoRA_LoHa", {"network_tucker": True, **CONVOLUTIONS}),
    "lokr + DoRA, plain LoRA's layers": Variant("LoRA_LoKr", {"use_dora": True, **SAME_LAYERS}),
    "lokr, both decomposed": Variant("LoRA_LoKr", {"network_decompose_both": True, **NARROW}),
    "lokr, full matrix": Variant("LoRA_LoKr", {"network_full_matrix": True}, faster=20),
    "lokr, tucker": Variant("LoRA_LoKr", {"network_tucker": True, **NARROW}),
    "norm": Variant("LoRA_Norm", faster=10),
    "eh": Variant("LoRA_EH", faster=4),
    "boft, attention": Variant("LoRA_BOFT", ATTENTION, faster=5),
    "lierla, lower rate": Variant(faster=FASTER / 2, swept=False),
    "LaLoRA, weight 30, higher rate": Variant("LaLoRA", LALORA, swept=False),
    "null, activations, lower rate": Variant("NullActivations", NULL, faster=30, swept=False),
}
"""In order of importance: a sweep that has to be broken off has measured the first ones. The last ones are what others
are compared with at equal success.
"""

OF_TYPE = ("network_", "lalora_", "abm_", "num_experts", "use_dora", "loraplus_")
"""What a preset decides here; the rest is COMMON."""
MOST_RANK = 16


def prepare(folder: Path) -> None:
    """Draw the twelve pictures below `folder`."""
    world.write_folder(folder / "pictures", concept_scenes(12, seed=3), seed=3)


def scenarios(folder: Path) -> tuple[Scenario, ...]:
    """One scenario per variant, on the pictures below `folder`."""
    pictures, cache = folder / "pictures", folder / "svd.safetensors"
    common = {**COMMON, "lora_data_directory": str(pictures), "svd_cache_path": str(cache)}
    meter = Meter(ASKED, UNRELATED)
    return tuple(_scenario(label, variant, common, meter) for label, variant in VARIANTS.items())


def _scenario(label: str, variant: Variant, common: Mapping[str, object], meter: Meter) -> Scenario:
    job = {**common, **settings(variant)}
    if "svd_cache_path" in job and job["network_type"] not in ("null", "universal"):
        del job["svd_cache_path"]
    shipped = float(str(job["train_learning_rate"]))
    plain = {**common, **settings(Variant())}
    del plain["svd_cache_path"]
    return Scenario(
        task=TASK,
        variant=label,
        job=job,
        measure=partial(measure, meter),
        value=value,
        rates=tuple(float(f"{shipped * factor:.2g}") for factor in (LADDER if variant.swept else (1.0,))),
        goals=(Goal("asked", low=GOAL), Goal("worst fall", high=0.05)),
        widen=2,
        unit={**plain, "train_iterations": 10, "save_per_steps": 0, "train_seed": 0},
    )


def settings(variant: Variant) -> dict[str, object]:
    """What a variant sets: its preset's type, options and rate, made fit for this world, and its own changes."""
    shipped = json.loads((ROOT / "presets" / f"{variant.preset}.json").read_text(encoding="utf-8"))
    found = {key: value for key, value in shipped.items() if key.startswith(OF_TYPE)}
    for rank, alpha in (("network_rank", "network_alpha"), ("network_conv_rank", "network_conv_alpha")):
        if found.get(rank, 0) > MOST_RANK:
            found[alpha] = found[alpha] * MOST_RANK / found[rank]
            found[rank] = MOST_RANK
    rate = float(f"{shipped['train_learning_rate'] * variant.faster:.2g}")
    return {**found, "train_learning_rate": rate, **variant.changes}


def value(figures: Mapping[str, float]) -> float:
    """How good a result is: success, less what is forgotten beyond two points, a little more when it came early."""
    early = 1 - figures["steps to half"] / STEPS if math.isfinite(figures["steps to half"]) else 0.0
    return figures["asked"] - max(0.0, figures["worst fall"] - 0.02) + 0.1 * early


def measure(meter: Meter, trained: Trained) -> Figures:
    """Success, forgetting, cost, and how soon half of it and all of it was there and what it had cost by then."""
    asked, fall, drift = meter.asked(trained), meter.fall(trained), meter.drift(trained)
    course = Course(meter, trained, {0: (meter.asked_before(trained), 0.0), STEPS: (asked.value, drift.moved)})
    half, goal = course.steps_to(HALF), course.steps_to(GOAL)
    figures: dict[str, object] = {
        "asked": asked,
        "worst fall": fall,
        "drift": drift.moved,
        "signs kept": drift.signs,
        "steps to half": half,
        "steps to goal": goal,
        "CPU seconds to half": course.seconds_at(half),
        "CPU seconds to goal": course.seconds_at(goal),
        "drift at half": course.drift_at(HALF),
        "step time": trained.trace.step_seconds / trained.unit if trained.unit else math.nan,
        "parameters": float(str(trained.trace.report["trainable parameters"])),
        "file KB": trained.path.stat().st_size / 1024,
    }
    for name, share in zip(("signs before ABM", "signs after ABM"), trained.trace.noted(SIGNS), strict=False):
        figures[name] = share / 100
    for path in trained.path.parent.glob(f"{trained.path.stem}_*steps.safetensors"):
        path.unlink()
    return figures  # type: ignore[return-value]


@dataclass(frozen=True)
class Course:
    """Success and drift on the way: `points` of the start and the end, and of the kept files once they were read."""

    meter: Meter
    trained: Trained
    points: dict[int, tuple[float, float]]

    def steps_to(self, success: float) -> float:
        """The first kept file that is there; infinite when the end is short of it.

        The files are halved in search of it, as if success never fell again on the way.
        """
        if self._at(STEPS)[0] < success:
            return math.inf
        failed, reached = 0, STEPS
        while reached - failed > EVERY:
            step = (failed + reached) // (2 * EVERY) * EVERY
            failed, reached = (failed, step) if self._at(step)[0] >= success else (step, reached)
        return reached

    def seconds_at(self, step: float) -> float:
        """CPU seconds from the start of the run, preparation included, to a step."""
        return self.trained.trace.at.get(int(step), math.inf) if math.isfinite(step) else math.inf

    def drift_at(self, success: float) -> float:
        """The drift when success was exactly that; infinite when the end is short of it."""
        if self._at(STEPS)[0] < success:
            return math.inf
        return at_success(dict(self.points.values()), success)

    def _at(self, step: int) -> tuple[float, float]:
        if step not in self.points:
            path = self.trained.path.with_name(f"{self.trained.path.stem}_{step}steps.safetensors")
            with self.trained.network.at_strength(0.0):
                then = dataclasses.replace(self.trained, network=self.trained.reload(path))  # type: ignore[misc]
                self.points[step] = self.meter.asked(then).value, self.meter.drift(then).moved
        return self.points[step]


DETAILS = ("signs kept", "signs before ABM", "signs after ABM", "steps to goal", "steps", "seconds")
SECONDS = ("CPU seconds to half", "CPU seconds to goal")
SUITE = Suite("adapters", prepare, scenarios, frozenset((*DETAILS, *SECONDS)))
