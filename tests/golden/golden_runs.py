"""Short runs whose losses and files are recorded: what a change of structure must leave as it is, to the bit.

    python tests/golden/golden_runs.py            compare with tests/golden/runs.json, report what differs
    python tests/golden/golden_runs.py --exact    to the bit also where processors round differently
    python tests/golden/golden_runs.py --write    record anew (only where a change of results is meant)
    python tests/golden/golden_runs.py --add      record what this processor gives beside what others gave

The runs are computed with the kernels that every x86-64 processor has (`PLAIN_KERNELS`), so that a recording made on
one processor holds on another. MKL's decompositions and dot products do not keep that promise: the runs that need them
(`ROUNDED`) have a recording for each processor that was seen, and agree within a rounding with one of them elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
RECORD = Path(__file__).with_name("runs.json")

LORA = {"train_iterations": 4, "data_cache": "memory"}
WORDS = {
    "mode": "iLECO", "lora_data_directory": "", "original prompt": "red", "target prompt": "blue",
    "train_iterations": 4, "data_cache": "memory",
}  # fmt: skip
TEXT = {"network_targets": "both", "network_blocks(BASE = TextEncoder)": ["BASE", "IN01", "M00", "OUT01"]}
FEW = {"network_blocks(BASE = TextEncoder)": ["M00", "OUT00"]}
V = {"model_v_pred": True}
PAIR = {"train_iterations": 4, "data_cache": "memory"}

# name: (kind of base model, which test case makes its folders, settings)
RUNS: dict[str, tuple[str, str, dict[str, object]]] = {
    "lora-sd1": ("sd1", "images", LORA),
    "lora-sd1-stopped-and-resumed": ("sd1", "resume", {}),
    "lora-sd1-text": ("sd1", "images", {**LORA, **TEXT, "network_type": "c3lier", "network_conv_rank": 2}),
    "lora-sd2-v": ("sd2", "images", {**LORA, **V, "train_snr_gamma": 5, "train_loss_weighting": "debiased"}),
    "lora-sdxl": ("sdxl", "images", {**LORA, "train_optimizer": "AdamW", "train_gradient_accumulation": 2}),
    "lora-sdxl-text": ("sdxl", "images", {**LORA, **TEXT}),
    "lora-sd1-checkpointing": ("sd1", "images", {**LORA, "use_gradient_checkpointing": True}),
    "lora-sd1-dropouts": ("sd1", "images", {**LORA, "network_dropout": 0.2, "network_rank_dropout": 0.2}),
    "dora-sd1": ("sd1", "images", {**LORA, "use_dora": True}),
    "loha-sdxl": ("sdxl", "images", {**LORA, **FEW, "network_type": "loha"}),
    "lokr-sd2": ("sd2", "images", {**LORA, **V, **FEW, "network_type": "lokr"}),
    "dylora-sd1": ("sd1", "images", {**LORA, "network_type": "dylora", "network_unit": 1}),
    "ia3-sdxl": ("sdxl", "images", {**LORA, "network_type": "ia3"}),
    "glora-sd1": ("sd1", "images", {**LORA, "network_type": "glora"}),
    "oft-sd2": ("sd2", "images", {**LORA, **V, **FEW, "network_type": "oft"}),
    "boft-sd1": ("sd1", "images", {**LORA, **FEW, "network_type": "boft"}),
    "full-sd1": ("sd1", "images", {**LORA, **FEW, "network_type": "full"}),
    "norm-sdxl": ("sdxl", "images", {**LORA, "network_type": "norm"}),
    "eh-sd1": ("sd1", "images", {**LORA, **FEW, "network_type": "eh"}),
    "null-sd1": ("sd1", "images", {**LORA, "network_type": "null"}),
    "universal-sdxl": ("sdxl", "images", {**LORA, "network_type": "universal"}),
    "experts-sd2": ("sd2", "images", {**LORA, **V, "network_type": "experts"}),
    "tlora-sd1": ("sd1", "images", {**LORA, "network_timestep_rank": 2}),
    "pissa-sd1": ("sd1", "images", {**LORA, "network_init": "pissa"}),
    "lora-ga-sd1": ("sd1", "images", {**LORA, "network_init": "lora_ga"}),
    "abm-sd1": ("sd1", "images", {**LORA, "abm_enabled": True, "abm_steps": 3}),
    "prior-sd1": ("sd1", "images", {**LORA, "prior_loss_weight": 1.0, "prior_prompts": "a circle", "prior_states": 4}),
    "prodigy-sd1": ("sd1", "images", {**LORA, "train_optimizer": "Prodigy", "train_learning_rate": 1}),
    "came-sd1": ("sd1", "images", {**LORA, "train_optimizer": "CAME", "train_lr_scheduler": "cosine"}),
    "ileco-sd1": ("sd1", "images", WORDS),
    "ileco-sd2": ("sd2", "images", {**WORDS, **V, "ileco_guidance": 1.0}),
    "ileco-sdxl-instant": ("sdxl", "images", {**WORDS, "network_init": "instant", "network_element": "CrossAttention"}),
    "instant-sd1": ("sd1", "images", {**WORDS, "mode": "Instant"}),
    "instant-sdxl": ("sdxl", "images", {**WORDS, "mode": "Instant", "instant_method": "speed"}),
    "difference-sd1": ("sd1", "pairs", {**PAIR, "mode": "Difference"}),
    "difference-sdxl": ("sdxl", "pairs", {**PAIR, "mode": "Difference"}),
    "addift-sd1": ("sd1", "pairs", PAIR),
    "addift-sd2": ("sd2", "pairs", {**PAIR, **V, "diff_project": True}),
    "multi-addift-sdxl": ("sdxl", "pairs", {**PAIR, "mode": "Multi-ADDifT", "train_batch_size": 2}),
}


ROUNDED = {
    "abm-sd1", "dora-sd1", "ileco-sdxl-instant", "instant-sd1", "instant-sdxl", "null-sd1", "pissa-sd1", "prodigy-sd1",
    "universal-sdxl",
}  # fmt: skip
"""Runs that decompose matrices (gesdd) or take long dot products (Prodigy's, ABM's)."""
LOSS_ROUNDING, SIZE_ROUNDING = 1e-5, 1e-3
"""How far the losses and the Euclidean norm of a file's tensors may be from a recording, relatively."""

Run = dict[str, object]


def compute(only: str = "") -> dict[str, Run]:
    """{run: {losses by step, digests and norms of the files' tensors}}; losses are written to the bit."""
    import engine_case
    import pair_case

    from trainer.engine import preflight

    preflight.estimated_bytes = lambda *_: 0  # predicting memory would take most of the time
    makers = {"images": engine_case.make, "resume": engine_case.make, "pairs": pair_case.make}
    cases: dict[tuple[str, str], engine_case.Case] = {}
    found: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, what, settings) in RUNS.items():
            if only not in name:
                continue
            key = (kind, "pairs" if what == "pairs" else "images")
            if key not in cases:
                cases[key] = makers[what](Path(folder) / "-".join(key), kind)
            case = cases[key]
            if what == "resume":
                losses, whole = engine_case.stopped_and_resumed(case, name, **settings)
                files = [case.places.loras / f"{name}-{end}.safetensors" for end in ("parts", "whole")]
                found[name] = {
                    "losses": losses,
                    "whole": whole,
                    **contents(files),
                }
                continue
            trace = engine_case.Trace()
            result = case.run(trace, save_lora_name=name, **settings)
            found[name] = {"losses": trace.losses, **contents([result.path])}
    return json.loads(json.dumps(found))


def contents(paths: Sequence[Path]) -> dict[str, list[str] | list[float]]:
    """Of each file the SHA-256 of its tensors with their names, types and shapes (its metadata have dates in them), and
    the Euclidean norm of all of them.
    """
    import torch
    from safetensors.torch import load_file

    digests, norms = [], []
    for path in paths:
        hashed, squares = hashlib.sha256(), 0.0
        for name, tensor in sorted(load_file(path).items()):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            squares += float(tensor.double().square().sum())
        digests.append(hashed.hexdigest()[:16])
        norms.append(math.sqrt(squares))
    return {"files": digests, "sizes": norms}


def differences(recorded: dict[str, list[Run]], found: dict[str, Run], exact: bool = False) -> list[str]:
    """A line for each run that is none of its recordings."""
    lines = []
    for name in sorted(recorded.keys() | found.keys()):
        variants, now = recorded.get(name, []), found.get(name)
        if not variants or now is None:
            lines.append(f"{name}: {'not recorded' if not variants else 'recorded, but not run'}")
        elif any(same(one, now) for one in variants) or (
            name in ROUNDED and not exact and any(close(one, now) for one in variants)
        ):
            continue
        else:
            parts = [key for key in EXACT if variants[0].get(key) != now.get(key)]
            lines.append(f"{name}: {', '.join(parts)} differ: {variants[0].get(parts[0])} became {now[parts[0]]}")
    return lines


EXACT = ("losses", "whole", "files")
"""The parts of a recording that are compared to the bit; the norms stand in for the digests where it is not."""


def same(one: Run, other: Run) -> bool:
    return all(one.get(part) == other.get(part) for part in EXACT)


def close(one: Run, other: Run) -> bool:
    """Whether two runs agree in everything but the last bits."""
    return all(
        len(numbers(one[part])) == len(numbers(other[part]))
        and all(
            math.isclose(a, b, rel_tol=rounding) for a, b in zip(numbers(one[part]), numbers(other[part]), strict=True)
        )
        for part, rounding in (("losses", LOSS_ROUNDING), ("sizes", SIZE_ROUNDING))
    )


def numbers(part: object) -> list[float]:
    return list(part.values() if isinstance(part, dict) else part)  # type: ignore[call-overload]


def main() -> int:
    """Compare or record; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--add", action="store_true", help="record what is found beside what other processors gave")
    parser.add_argument(
        "--exact", action="store_true", help="compare to the bit also where processors round differently"
    )
    parser.add_argument("--only", default="", help="runs with this in their name")
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in PLAIN_KERNELS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PLAIN_KERNELS})
    found = compute(given.only)
    kept: dict[str, list[Run]] = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    if given.write or given.add:
        for name, run in found.items():
            variants = kept.get(name, []) if given.add and name in ROUNDED else []
            kept[name] = [*variants, run] if not any(same(one, run) for one in variants) else variants
        RECORD.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", "utf-8")
        return 0
    lines = differences({name: runs for name, runs in kept.items() if given.only in name}, found, given.exact)
    print("\n".join(lines) or f"{len(found)} runs are as recorded.")
    return 1 if lines else 0


if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests / "support"), str(tests.parent)]
    sys.exit(main())
