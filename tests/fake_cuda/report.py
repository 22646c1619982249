"""What the memory report says against what the fake card counts: `python -m fake_cuda.report [GROUP]`.

    python -m fake_cuda.report            what the test runs: every kind of run on the demo model
    python -m fake_cuda.report full       the same at the sizes that people train with; some minutes
    python -m fake_cuda.report quick --json

PYTHONPATH must name the repository, its `tests` folder and `tests/support`.
"""

from __future__ import annotations

from .run import STEP, Bench, Watch, watched  # isort: skip (it loads the card's library, before torch)

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.engine import memory, preflight, shortage

from . import card as cards
from .rows import PREVIEW, TEXTS, UNET, Row

SAVING = {"use_gradient_checkpointing": True}
PRIOR = {"prior_loss_weight": 1.0, "prior_states": 2, "prior_batch_size": 4}


def configurations(base: str, size: int) -> list[Row]:
    """One run of every kind that decides memory."""
    kinds: dict[str, dict[str, object]] = {
        "fp16": {**UNET, **PREVIEW},
        "batch 4": {**UNET, "train_batch_size": 4},
        "checkpointing": {**UNET, **SAVING},
        "fp32, Prodigy": {**UNET, "train_model_precision": "fp32", "train_optimizer": "Prodigy"},
        "bf16, LoRA bf16, Lion": {
            **UNET, "train_model_precision": "bf16", "train_lora_precision": "bf16", "train_optimizer": "Lion",
        },
        "text encoder": {**TEXTS, **SAVING, **PREVIEW},
        "dora": {**UNET, "use_dora": True},
        "loha": {**UNET, "network_type": "loha", **SAVING},
        "full": {**UNET, "network_type": "full"},
        "Multi-ADDifT": {**UNET, "mode": "Multi-ADDifT"},
        "iLECO": {**UNET, "mode": "iLECO", **SAVING},
        "prior": {**UNET, **SAVING, **PRIOR},
    }  # fmt: skip
    return [Row(f"{base} {size}: {name}", settings, base, size) for name, settings in kinds.items()]


def quick() -> list[Row]:
    """All kinds on the demo model."""
    return configurations("demo", 256)


def full() -> list[Row]:
    """All kinds on SD1.5, and SDXL."""
    return [*configurations("sd1", 512), Row("sdxl 1024: checkpointing", {**UNET, **SAVING, **PREVIEW}, "sdxl", 1024)]


GROUPS: dict[str, Callable[[], list[Row]]] = {"quick": quick, "full": full}


def compared(row: Row, bench: Bench, number: int) -> dict[str, tuple[int, int]]:
    """{phase: (bytes that the report says, bytes that the card counted)} of a run."""
    from trainer.engine.run import Request, run
    from trainer.events import EventLog
    from trainer.models.base import Model
    from trainer.places import Places

    places = Places.standalone(bench.root / "models").under(bench.root / f"report {number}")
    places = dataclasses.replace(places, vocabularies=(*places.vocabularies, bench.vocabulary))
    told: dict[str, int] = {}
    estimate = preflight.phase_bytes

    def phase_bytes(*args: object) -> dict[str, int]:
        told.update(estimate(*args))
        return told

    with cards.inserted() as card, contextlib.ExitStack() as stack:
        watch = Watch(card)
        for place, name, value in (
            (Model, "hash", lambda self: "0" * 64),
            (preflight, "phase_bytes", phase_bytes),
            # Here all tensors of the device are without numbers anyway.
            (memory, "FakeTensorMode", lambda **_: contextlib.nullcontext()),
        ):
            stack.enter_context(cards.mock.patch.object(place, name, value))
        stack.enter_context(watched(watch))
        run(Request(bench.job(row), places), EventLog())
    places_of = {shortage.TRAINING: STEP}  # within the phase previews are drawn, which have a figure of their own
    return {name: (size, watch.phases[places_of.get(name, name)].peak) for name, size in told.items()}


def main() -> None:
    """Run a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", default="quick", choices=GROUPS)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for number, row in enumerate(row for row in GROUPS[given.group]() if given.only in row.name):
            found[row.name] = compared(row, bench, number)
            if given.json:
                continue
            print(row.name)
            for phase, (told, counted) in found[row.name].items():
                size, share = counted / 2**20, told / counted - 1
                print(f"  {phase:24}{told / 2**20:10.1f} MiB told{size:10.1f} counted{share:+8.1%}", flush=True)
    if given.json:
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the card cannot be ended: there is no CUDA to end it with


if __name__ == "__main__":
    main()
