"""Which runs are made on the fake card: the rows of the table, in groups that run in one process each.

The lists of adapter types, modes, optimizers and starts are the registries' own; a stage needs settings that ask for
it, and `test_fake_card.py` fails for one without. All eighteen combinations of the precisions of the model and of the
LoRA with checkpointing are run once with the plain type; beside them

- every mode meets each precision of the model and of the LoRA,
- every type and optimizer meets an fp16 model, whose gradients are scaled, another one, and a LoRA in bf16,

and checkpointing goes in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

PRECISIONS = ("fp16", "bf16", "fp32")
FEW = {"network_blocks(BASE = TextEncoder)": ["M00", "OUT01"]}
"""Few layers, where only the kinds of operators matter."""
PREVIEW = {"sample_prompts": "a red circle", "sample_every": 2, "sample_steps": 2}
TEXTS = {"network_targets": "both"}
FEW_WITH_TEXTS = {"network_blocks(BASE = TextEncoder)": ["BASE", "M00", "OUT01"], **TEXTS}
UNET = {"network_targets": "unet"}


@dataclass(frozen=True)
class Row:
    """One run: its name in the table, `base` (demo, sd1 or sdxl), `size` of its images in pixels, settings beside the
    usual ones. The run has two steps; the second counts.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    base: str = "demo"
    size: int = 64


def precisions(number: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Three pairs of precisions for the thing of this number, with checkpointing in turn: (name, settings). The first
    is with an fp16 model.
    """
    for shift, model in enumerate(PRECISIONS):
        lora = PRECISIONS[(number + shift) % 3]
        saves = bool((number + shift) % 2)
        name = f"{model}, LoRA {lora}{', checkpointing' if saves else ''}"
        yield name, {
            "train_model_precision": model, "train_lora_precision": lora, "use_gradient_checkpointing": saves,
        }  # fmt: skip


def two_precisions(number: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Of the three pairs the one with an fp16 model and one without; in one of the two the LoRA is in bf16."""
    fp16, *others = precisions(number)
    yield fp16
    yield others[number % 3 == 2]


def _each(
    kind: str, names: Mapping[str, Mapping[str, object]],
    pairs: Callable[[int], Iterator[tuple[str, dict[str, object]]]],
) -> list[Row]:  # fmt: skip
    return [
        Row(f"{kind} {name}: {text}", {**chosen, **settings})
        for number, (name, settings) in enumerate(names.items())
        for text, chosen in pairs(number)
    ]


def sizes(base: str, size: int) -> list[Row]:
    """The rows of one full-size base whose bytes and kernels matter."""
    cached = {**UNET, "train_lora_precision": "fp32"}
    saving = {"use_gradient_checkpointing": True}
    if base == "sdxl":
        return [Row(f"SDXL {size}: fp16, checkpointing", {**cached, **saving, **PREVIEW}, base, size)]
    return [
        Row(f"SD1.5 {size}: fp16", {**cached, **PREVIEW}, base, size),
        Row(f"SD1.5 {size}: fp16, checkpointing", {**cached, **saving}, base, size),
        Row(f"SD1.5 {size}: fp16, batch 4", {**cached, "train_batch_size": 4}, base, size),
        Row(f"SD1.5 {size}: bf16, LoRA bf16", {**cached, **_both("bf16")}, base, size),
        Row(f"SD1.5 {size}: fp32", {**cached, "train_model_precision": "fp32"}, base, size),
        Row(f"SD1.5 {size}: fp16 with text encoder", {**TEXTS, **saving}, base, size),
    ]


def _both(precision: str) -> dict[str, object]:
    return {"train_model_precision": precision, "train_lora_precision": precision}


def pairs() -> list[Row]:
    """Every pair of precisions, with and without checkpointing, on the demo model with its text encoder."""
    return [
        Row(
            f"demo: {model}, LoRA {lora}{', checkpointing' if saves else ''}",
            {
                "train_model_precision": model,
                "train_lora_precision": lora,
                "use_gradient_checkpointing": saves,
                **FEW_WITH_TEXTS,
            },
        )
        for model, lora, saves in itertools.product(PRECISIONS, PRECISIONS, (False, True))
    ]


def types() -> list[Row]:
    """Every adapter type."""
    from trainer.adapters.base import ADAPTERS

    return _each("type", {name: {"network_type": name, **FEW, **UNET} for name in ADAPTERS.names()}, two_precisions)


def optimizers() -> list[Row]:
    """Every optimizer whose package is installed."""
    import importlib.util

    from trainer.optim.optimizers import OPTIMIZERS

    names = [name for name in OPTIMIZERS.names() if importlib.util.find_spec(OPTIMIZERS.get(name).package)]
    return _each("optimizer", {name: {"train_optimizer": name, **FEW, **UNET} for name in names}, two_precisions)


def modes() -> list[Row]:
    """Every mode."""
    from trainer.modes.base import MODES

    return _each("mode", {name: {"mode": name, **FEW, **UNET} for name in MODES.names()}, precisions)


STAGES: dict[str, dict[str, object]] = {
    "abm": {"abm_enabled": True, "abm_steps": 2},
    "instant": {"mode": "iLECO", "network_init": "instant"},
    "lalora": {"lalora_lambda": 1.0, "lalora_prompts": "a red circle\na blue square"},
    "null space": {"network_type": "null", "network_null_space": "activations", "network_null_prompts": "a circle"},
    "prior": {"prior_loss_weight": 1.0, "prior_prompts": "a red circle", "prior_states": 4},
    "routing": {"network_type": "experts", "network_routing": "input"},
}
"""The settings that ask for each stage; the starts of `network_init` are the rows of the stage `start`."""

OPTIONS: dict[str, dict[str, object]] = {
    "DoRA": {"use_dora": True},
    "dropouts": {"network_dropout": 0.1, "network_rank_dropout": 0.1, "network_module_dropout": 0.1},
    "max norm": {"network_max_norm": 1.0},
    "convolutions": {"network_conv_rank": 4},
    "accumulation": {"train_gradient_accumulation": 2},
    "min-SNR, v-prediction": {"train_snr_gamma": 5, "model_v_pred": True},
    "guided iLECO with anchors and a bank": {
        "mode": "iLECO", "ileco_guidance": 2.0, "ileco_anchors": "a tree", "ileco_bank": 4,
    },
    "projected ADDifT": {"mode": "ADDifT", "diff_project": True},
    "previews": PREVIEW,
    "resume state": {"train_state_every": 1},
}  # fmt: skip


def stages() -> list[Row]:
    """Every stage and every start."""
    from trainer.stages.start import DIFFERENCE_INITS

    ordered = sorted(DIFFERENCE_INITS, key=lambda name: ("_" in name, name))  # a set has no order of its own
    starts = {name: {"network_init": name} for name in ordered}
    return _once("stage", {**STAGES, **starts})


def options() -> list[Row]:
    """Settings that change what a step does."""
    return _once("option", OPTIONS)


def _once(kind: str, names: Mapping[str, Mapping[str, object]]) -> list[Row]:
    """A row for each name, the pairs of precisions in turn."""
    return [
        Row(f"{kind} {name}: {text}", {**FEW, **UNET, **settings, **chosen})
        for number, (name, settings) in enumerate(names.items())
        for text, chosen in [list(precisions(number))[number % 3]]
    ]


GROUPS: dict[str, Callable[[], list[Row]]] = {
    "SDXL": lambda: sizes("sdxl", 1024),
    "SD1.5": lambda: sizes("sd1", 512),
    "types": types,
    "optimizers": optimizers,
    "modes": modes,
    "precisions": pairs,
    "stages": stages,
    "options": options,
}

TOGETHER = (
    ("SDXL", "SD1.5"),
    ("modes", "stages", "options"),
    ("optimizers",),
    ("types",),
    ("precisions",),
)
"""Groups that share a process, of which the start takes ten seconds; those that take longest come first."""
