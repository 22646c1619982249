"""Settings that the installed packages cannot serve: known before a run, with the command of this Python."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from trainer.engine import packages
from trainer.engine.catalogue import catalogue
from trainer.engine.preflight import check_before_loading
from trainer.errors import JobError
from trainer.optim.optimizers import OPTIMIZERS
from trainer.params.codec import load
from trainer.places import Places

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))

    return hide


def test_each_value_names_its_package_and_the_command_of_this_python(without, monkeypatch) -> None:
    without("pytorch_optimizer", "bitsandbytes", "wandb", "tensorboard")
    monkeypatch.setattr(sys, "executable", "C:\\my venv\\python.exe")
    found = packages.unserved(CUDA)
    theirs = {name for name, traits in OPTIMIZERS.items() if traits.package in ("pytorch_optimizer", "bitsandbytes")}
    assert set(found["train_optimizer"]) == theirs and {"CAME", "Prodigy", "AdamW8bit"} <= theirs
    assert 'with: "C:\\my venv\\python.exe" -m pip install pytorch-optimizer' in found["train_optimizer"]["CAME"]
    assert found["train_optimizer"]["AdamW8bit"].endswith("-m pip install bitsandbytes")
    assert set(found["logging_trackers"]) == {"tensorboard", "wandb"}
    without()
    on_cpu = packages.unserved(CPU)["train_optimizer"]
    assert "NVIDIA GPU" in on_cpu["AdamW8bit"] and "CAME" not in on_cpu


def test_a_job_that_needs_them_is_refused_at_its_fields_with_all_its_other_problems(without, tmp_path: Path) -> None:
    without("pytorch_optimizer", "wandb")
    settings = {"format": 1, "mode": "LoRA", "train_optimizer": "came", "logging_trackers": "wandb"}
    job = load({**settings, "network_resume": "/nowhere.safetensors"}, catalogue(), complete=False).job
    places = Places.standalone(tmp_path)
    with pytest.raises(JobError) as caught:
        check_before_loading(job, places)
    assert {problem.field for problem in caught.value.problems} >= {
        "train_optimizer", "logging_trackers", "network_resume",
    }  # fmt: skip
    instant = load({**settings, "mode": "Instant"}, catalogue(), complete=False).job  # shows no optimizer
    assert [problem.field for problem in packages.unserved_problems(instant)] == ["logging_trackers"]
