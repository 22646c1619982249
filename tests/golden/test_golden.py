"""Short runs give what was recorded, to the bit: a change of structure changes no result."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

from golden import golden_runs

HERE = Path(__file__).parent


def test_golden_runs_give_the_recorded_losses_and_files() -> None:
    # A process of its own: which kernels compute is decided when torch is imported.
    command = [sys.executable, str(HERE / "golden_runs.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_golden_differences_names_what_changed() -> None:
    recorded = json.loads(golden_runs.RECORD.read_text("utf-8"))
    assert set(recorded) == set(golden_runs.RUNS) and len(recorded) >= 24
    assert all(len(variants) == 1 for name, variants in recorded.items() if name not in golden_runs.ROUNDED)
    found = {name: copy.deepcopy(variants[-1]) for name, variants in recorded.items()}
    assert not golden_runs.differences(recorded, found, exact=True)
    for name in ("lora-sd1", "pissa-sd1"):  # the last bits
        found[name]["losses"]["1"] *= 1 + 1e-7
    found["null-sd1"]["files"], found["null-sd1"]["sizes"] = ["other"], [found["null-sd1"]["sizes"][0] * 1.01]
    del found["ileco-sd1"]
    lines = golden_runs.differences(recorded, found)
    assert [line.split(":")[0] for line in lines] == ["ileco-sd1", "lora-sd1", "null-sd1"]
    lines = golden_runs.differences(recorded, found, exact=True)
    assert [line.split(":")[0] for line in lines] == ["ileco-sd1", "lora-sd1", "null-sd1", "pissa-sd1"]
