"""Short runs give what was recorded, to the bit: a change of structure changes no result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden_runs

HERE = Path(__file__).parent


def test_golden_runs_give_the_recorded_losses_and_files() -> None:
    # A process of its own: which kernels compute is decided when torch is imported.
    command = [sys.executable, str(HERE / "golden_runs.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_golden_differences_names_what_changed() -> None:
    recorded = json.loads(golden_runs.RECORD.read_text("utf-8"))
    assert set(recorded) == set(golden_runs.RUNS) and len(recorded) >= 24
    changed = json.loads(json.dumps(recorded))
    changed["lora-sd1"]["losses"]["1"] += 1e-7
    del changed["ileco-sd1"]
    lines = golden_runs.differences(recorded, changed)
    assert [line.split(":")[0] for line in lines] == ["ileco-sd1", "lora-sd1"]
