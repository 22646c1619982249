"""Resume: the next loss is the same, bit for bit, whatever ended the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import children
import engine_case
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.engine.control import Control
from trainer.engine.resume import read_job
from trainer.engine.run import Request, run
from trainer.errors import AdapterError, JobError, TrainingError
from trainer.events import EventLog, Step
from trainer.optim.optimizers import OPTIMIZERS
from trainer.stages.lalora import COLUMNS, MARK, ROWS, VERSION

pytestmark = pytest.mark.usefixtures("no_estimate")

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("case"))


@pytest.mark.everywhere  # all sets have the same torch and the same library of optimizers
@pytest.mark.parametrize("name", [name for name, traits in OPTIMIZERS.items() if not traits.needs_cuda])
def test_every_optimizer_resumes_bit_for_bit(case, name):
    rate = 1.0 if OPTIMIZERS.get(name).wants_lr_one else 1e-3
    resumed, whole = engine_case.stopped_and_resumed(case, name, train_optimizer=name, train_learning_rate=rate)
    assert resumed == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"train_lr_scheduler": "reduce_on_plateau"},
        {"train_lr_scheduler": "one_cycle", "train_gradient_accumulation": 2},
        {"network_blocks(BASE = TextEncoder)": ["BASE", "M00"]},
        {"train_model_precision": "fp16"},
    ],
)
def test_other_settings_resume_bit_for_bit(case, changes):
    name = "-".join(str(value)[:8] for value in changes.values()).replace("[", "").replace("'", "").replace(",", "")
    resumed, whole = engine_case.stopped_and_resumed(case, name, **changes)
    assert resumed == whole


def test_changed_pictures_are_noticed(case, tmp_path):
    other = engine_case.make(tmp_path)
    changes = {"train_state_every": 2, "train_iterations": 4, "data_cache": "memory"}
    control = Control()

    def stop(event):
        if isinstance(event, Step) and event.step == 2:
            control.stop()

    stopped = other.run(stop, control=control, save_lora_name="changed", **changes)
    (other.pictures / "00.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(TrainingError, match="changed"):
        other.run(resume=stopped.folder, save_lora_name="changed", **changes)


def test_a_folder_without_state_is_refused(case, tmp_path):
    with pytest.raises(TrainingError, match=r"job\.json"):
        read_job(tmp_path)
    with pytest.raises(TrainingError, match="state"):
        case.run(resume=tmp_path, save_lora_name="nostate")


def test_the_job_of_a_run_is_replaced_as_a_whole(case, monkeypatch):
    """A power cut while a run is being resumed leaves the job it has; one that is damaged is named."""
    control = Control()

    def stop(event):
        if isinstance(event, Step):
            control.stop()

    changes = {"save_lora_name": "cut", "train_iterations": 4, "train_state_every": 1}
    folder = case.run(stop, control=control, **changes).folder
    before, replace = (folder / "job.json").read_bytes(), os.replace

    def cut(source, target):
        if Path(target).name == "job.json":
            raise InterruptedError
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="run folder .* cannot be written"):
        patch.setattr("os.replace", cut)
        case.run(resume=folder, **changes, save_per_steps=2)
    assert (folder / "job.json").read_bytes() == before and read_job(folder) == case.job(**changes)
    (folder / "job.json").write_bytes(before[:40])
    with pytest.raises(JobError, match=r"job\.json.*is not JSON"):
        read_job(folder)


@pytest.mark.everywhere
def test_a_run_killed_again_and_again_ends_with_the_same_losses(tmp_path):
    """SIGKILL after five random steps, one more in the middle of writing a state; the run still has one loss trace."""

    def start(case, folder, kill_step=0, kill_write=0):
        what = map(str, (case.root, folder, kill_step, kill_write))
        command = [sys.executable, str(SUPPORT / "killed_run.py"), *what]
        return subprocess.run(command, cwd=SUPPORT, env=children.environment(), capture_output=True).returncode

    def run_folder(case):
        (folder,) = case.places.logs.glob("*/*-killed")
        return folder

    whole, case = engine_case.make(tmp_path / "whole"), engine_case.make(tmp_path / "killed")
    assert start(whole, "fresh") == 0
    steps = sorted(random.Random(11).sample(range(4, 20), 5))
    assert start(case, "fresh", kill_step=steps[0]) == -signal.SIGKILL
    folder = run_folder(case)
    assert start(case, folder, kill_write=1) == -signal.SIGKILL
    for step in steps[1:]:
        assert start(case, folder, kill_step=step) == -signal.SIGKILL
    assert start(case, folder) == 0
    losses = engine_case.csv_losses(folder)
    assert sorted(losses) == list(range(1, 21)) and losses == engine_case.csv_losses(run_folder(whole))


def test_the_lora_that_a_run_began_from_is_not_needed_to_resume_it(case):
    began = case.run(save_lora_name="began", train_iterations=2)
    changes = {"train_iterations": 4, "train_state_every": 2, "network_resume": str(began.path)}
    whole, parts, control = engine_case.Trace(), engine_case.Trace(), Control()
    case.run(whole, save_lora_name="on-whole", **changes)

    def stop(event):
        if isinstance(event, Step) and event.step == 2:
            control.stop()

    stopped = case.run(parts, stop, control=control, save_lora_name="on", **changes)
    began.path.unlink()
    with pytest.raises(JobError, match="network_resume.*no such file"):
        case.run(save_lora_name="anew", **changes)
    assert case.run(parts, resume=stopped.folder, save_lora_name="on", **changes).reason == "done"
    assert parts.losses == whole.losses and sorted(whole.losses) == [1, 2, 3, 4]


def test_files_that_a_run_began_from_are_not_needed_to_resume_it(case, tmp_path):
    """The bases lie in the state: their file may be gone and the cache beside it broken. Curvature does not."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    draws = torch.Generator().manual_seed(2)
    tensors = load_file(case.run(save_lora_name="sizes", train_iterations=1).path)
    fan_in, fan_out = tensors[f"{layer}.lora_down.weight"].shape[1], tensors[f"{layer}.lora_up.weight"].shape[0]
    basis, cache, context = (tmp_path / f"{name}.safetensors" for name in ("basis", "cache", "context"))
    sides = (torch.linalg.qr(torch.randn(size, 4, generator=draws)).Q for size in (fan_in, fan_out))
    down, up = (side.contiguous() for side in sides)
    made = {"basis_down": down.T.contiguous(), "basis_up": up, "basis_mean": torch.eye(4)}
    save_file({f"{layer}.{name}": value for name, value in made.items()}, basis, {"atelier_basis": "1"})
    sizes = {ROWS: fan_out, COLUMNS: fan_in}
    curved = {f"{layer}.{side}": torch.rand(size, generator=draws) for side, size in sizes.items()}
    save_file(curved, context, {MARK: VERSION})
    for kind, own in (("universal", {"basis_path": str(basis), "network_basis_mean": True}), ("null", {})):
        changes = {
            "network_type": kind, "svd_cache_path": str(cache), "lalora_lambda": 1.0, **own,
            "lalora_context_path": str(context), "train_iterations": 4, "train_state_every": 2,
        }  # fmt: skip
        kept = {path: path.read_bytes() for path in (basis, context)}
        whole, parts, control = engine_case.Trace(), engine_case.Trace(), Control()
        case.run(whole, save_lora_name=f"{kind}-whole", **changes)

        def stop(event, control=control):
            if isinstance(event, Step) and event.step == 2:
                control.stop()

        stopped = case.run(parts, stop, control=control, save_lora_name=kind, **changes)
        cache.write_bytes(b"not a file of tensors")
        basis.unlink()
        context.unlink()
        again = Request(read_job(stopped.folder), case.places, resume=stopped.folder)
        with pytest.raises(AdapterError, match=r"lalora_context_path = .*Put it back as .*context\.safetensors"):
            run(again, EventLog())
        context.write_bytes(kept[context])
        assert run(again, EventLog(parts)).reason == "done"
        assert parts.losses == whole.losses and sorted(whole.losses) == [1, 2, 3, 4]
        basis.write_bytes(kept[basis])
        cache.unlink()
