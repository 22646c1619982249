"""Two processes under torchrun: the same losses as one with the doubled batch, and one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import children
import engine_case
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.everywhere
def test_two_processes_train_like_one_with_the_doubled_batch(tmp_path):
    case = engine_case.make(tmp_path)
    changes = {"train_iterations": 20, "train_state_every": 20}
    alone = engine_case.Trace()
    case.run(alone, save_lora_name="alone", train_batch_size=4, **changes)

    job = case.job_file(save_lora_name="together", train_batch_size=2, **changes)
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(children.free_port()),
        ),
        *("-m", "trainer", "train", str(job), "--output-dir", str(case.root / "out"), "--json"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=children.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    (folder,) = case.places.logs.glob("*/*-together")
    with safe_open(folder / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["processes"] == 2
    together = engine_case.csv_losses(folder)
    assert sorted(together) == sorted(alone.losses) == list(range(1, 21))
    for step, loss in alone.losses.items():
        assert together[step] == pytest.approx(loss, rel=1e-5)
    assert [path.name for path in case.places.loras.glob("together*")] == ["together.safetensors"]
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [event["reason"] for event in events if event["event"] == "finished"] == ["done"]
