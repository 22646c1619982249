"""A run that goes on: it is the same run, it may become longer, and no finished file is lost by it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import children
import engine_case
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.adapters.file import read_lora
from trainer.cli import jobs
from trainer.engine.control import Control
from trainer.engine.csvlog import read_losses
from trainer.engine.folder import new_folder, open_folder
from trainer.engine.resume import amend, read_job
from trainer.engine.run import Result, run
from trainer.engine.state import read_state
from trainer.errors import AdapterError, DataError, JobError, TrainingError
from trainer.events import Event, EventLog, Note, Step
from trainer.params.core import Train

pytestmark = pytest.mark.usefixtures("no_estimate")

ROOT = Path(__file__).resolve().parents[2]
PAIR = {"mode": "Difference", "original image": "a.png", "target image": "b.png"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> engine_case.Case:
    return engine_case.make(tmp_path_factory.mktemp("case"))


def stopped(case: engine_case.Case, name: str, at: int = 3, **changes: object) -> Result:
    """A run of six steps that was stopped after some."""
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == at:
            control.stop()

    changes = {"train_iterations": 6, "train_state_every": 1, "data_cache": "memory", **changes}
    return case.run(stop, control=control, save_lora_name=name, **changes)


def resumed(case: engine_case.Case, folder: Path, *settings: str, listen: Callable[[Event], None] = id) -> Result:
    """What `train --resume FOLDER --set …` does."""
    log = EventLog(listen)
    request = jobs.request(str(folder), jobs.Given(settings), case.places, resume=True, dry=False, log=log)
    return run(request, log)


# ---------------------------------------------------------------- names


def test_a_finished_file_is_not_replaced_by_a_run_that_goes_on(case):
    first = stopped(case, "shared")
    second = case.run(save_lora_name="shared", train_iterations=2, network_rank=2)
    before, told = second.path.read_bytes(), []
    result = resumed(case, first.folder, listen=lambda event: told.append(event))
    assert second.path.read_bytes() == before and result.path.name == "shared-1.safetensors"
    assert read_lora(result.path)[1]["ss_network_dim"] == "4"
    assert any(isinstance(event, Note) and "shared.safetensors is there already" in event.text for event in told)
    again = case.run(save_lora_name="shared", train_iterations=2, save_overwrite=True, train_seed=4)
    assert again.path == second.path and second.path.read_bytes() != before


def test_two_runs_of_one_name_at_the_same_time_lose_nothing(case):
    """Two that both found the name free: two folders, two files, each of its own run."""
    results, gate = {}, threading.Barrier(2)

    def carry_out(rank: int) -> None:
        changes = {"save_lora_name": "twice", "train_iterations": 2, "network_rank": rank, "data_cache": "memory"}

        def wait(event: Event) -> None:
            if isinstance(event, Step) and event.step == 1:
                gate.wait(60)

        results[rank] = case.run(wait, **changes)

    threads = [threading.Thread(target=carry_out, args=(rank,)) for rank in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[2].folder != results[3].folder
    assert {result.path.name for result in results.values()} == {"twice.safetensors", "twice-1.safetensors"}
    for rank, result in results.items():
        assert read_job(result.folder).value("network_rank") == rank
        assert read_lora(result.path)[1]["ss_network_dim"] == str(rank)
        assert [step for step, _ in read_losses(result.folder / "twice.csv")] == [1, 2]


def test_a_finished_run_that_is_resumed_leaves_its_file_as_it_is(case):
    done = case.run(save_lora_name="finished", train_iterations=2, train_state_every=1, data_cache="memory")
    before, changed = done.path.read_bytes(), done.path.stat().st_mtime_ns
    result = resumed(case, done.folder)
    assert result.path == done.path and done.path.stat().st_mtime_ns == changed and done.path.read_bytes() == before
    assert not list(case.places.loras.glob("finished-*"))


# ---------------------------------------------------------------- folders


def test_a_run_folder_is_of_one_process(case, tmp_path):
    places = case.places.under(tmp_path)
    held = [new_folder(places, "same") for _ in range(3)]  # in one second, as a rule
    assert len({one.path for one in held}) == 3
    with pytest.raises(TrainingError, match="running in another process"):
        open_folder(held[0].path)
    held[0].keep_job(case.job())
    for one in held:
        one.close()
    assert [path for path in places.logs.glob("*/*")] == [held[0].path], "those that were not used are gone"
    (held[0].path / ".tmpAbCdEf").write_bytes(b"half a state")
    (held[0].path / "state.tmp").write_bytes(b"half a state")
    again = open_folder(held[0].path)
    assert sorted(os.listdir(held[0].path)) == ["job.json", "run.lock"]
    again.close()


# ---------------------------------------------------------------- the same run


def test_a_refused_resume_leaves_its_folder_as_it_was(case, tmp_path):
    run_folder = stopped(case, "untouched").folder
    other = tmp_path / "other"
    shutil.copytree(case.pictures, other)
    (other / "more.png").write_bytes(next(case.pictures.glob("*.png")).read_bytes())

    def held() -> dict[str, tuple[bytes, int]]:
        files = [path for path in run_folder.rglob("*") if path.is_file()]
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before, written = held(), list(case.places.json.rglob("*"))
    with pytest.raises(TrainingError, match="images, captions or image settings changed"):
        resumed(case, run_folder, "train_iterations=9", f"lora_data_directory={other}", "save_as_json=True")
    assert held() == before and list(case.places.json.rglob("*")) == written
    resumed(case, run_folder, "train_iterations=9")
    assert read_job(run_folder)[Train].train_iterations == 9


def test_settings_that_were_edited_are_refused_by_name(case):
    folder = stopped(case, "edited").folder
    job = json.loads((folder / "job.json").read_text())
    edited = {**job, "network_rank": 8, "train_optimizer": "Lion", "save_per_steps": 2}
    (folder / "job.json").write_text(json.dumps(edited))
    with pytest.raises(JobError) as caught:
        resumed(case, folder)
    assert {problem.field for problem in caught.value.problems} == {"network_rank", "train_optimizer"}
    assert "was 4 when this run began" in str(caught.value) and "'AdamW'" in str(caught.value)
    (folder / "job.json").write_text(json.dumps(job))
    with pytest.raises(JobError, match="train_learning_rate"):
        resumed(case, folder, "train_learning_rate=1", "save_per_steps=2")
    assert resumed(case, folder).reason == "done"


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    case = engine_case.make(tmp_path)
    folder, path = stopped(case, "weights").folder, case.model / "unet" / "diffusion_pytorch_model.safetensors"
    right = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name, value in tensors.items() if value.dim() > 1)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path)
    with pytest.raises(TrainingError, match="other weights than when this run was stopped: unet of base"):
        resumed(case, folder)
    path.write_bytes(right)
    assert resumed(case, folder).reason == "done"


def _facts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_a_damaged_state_is_refused_whatever_is_wrong_with_it(case):
    """Everything a bit flip or an editor can do to it, also to one of the format before, which has no digest."""
    folder = stopped(case, "damaged").folder
    path = folder / "state.safetensors"
    whole = path.read_bytes()
    tensors, metadata = _facts(path)
    facts = json.loads(metadata["state"])
    network = next(key for key in tensors if key.startswith("network/"))
    moment = next(key for key in tensors if key.endswith("exp_avg"))
    changed_tensors = [
        *({**tensors, key: value} for key in (network, moment) for value in (
            tensors[key].half(), tensors[key].reshape(-1)[:3].clone(), tensors[key] + 1)),
        *({key: value for key, value in tensors.items() if key != gone} for gone in (network, moment, "rng/cpu")),
    ]  # fmt: skip
    odd = ("🐱", float("inf"), [1], None, 10**30, {})
    changed_facts = [
        *({key: value for key, value in facts.items() if key != gone} for gone in facts),
        *({**facts, key: value} for key in ("step", "pass", "loss_average", "optimizer", "scheduler") for value in odd),
    ]
    tried = 0
    for number in (2, 1):
        for held, told in [*((held, facts) for held in changed_tensors), *((tensors, told) for told in changed_facts)]:
            given = {"state": json.dumps({**told, "format": number} if "format" in told else told)}
            save_file(held, path, {**given, **({"digest": metadata["digest"]} if number == 2 else {})})
            if number == 2:
                with pytest.raises(TrainingError, match="damaged|cannot be read|format"):
                    read_state(folder)
            tried += 1
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(TrainingError, match="cannot be read"):
            read_state(folder)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(TrainingError, match="damaged"):
        resumed(case, folder)
    unfit = (
        (changed_tensors[1], facts), (changed_tensors[-2], facts), (tensors, {**facts, "optimizer": {}}),
        (changed_tensors[4], facts),  # a fused step would read beyond the end of this one
    )  # fmt: skip
    for held, told in unfit:
        save_file(held, path, {"state": json.dumps({**told, "format": 1})})  # an older state that does not fit
        with pytest.raises(TrainingError, match="does not fit this run"):
            resumed(case, folder)
    for odd_fact in ({"skips": {"owed": "1"}}, {"total": "4"}, {"weights": {"unet": 1}}, {"job": 1}, {"model": None}):
        save_file(tensors, path, {"state": json.dumps({**facts, "format": 1, **odd_fact})})
        with pytest.raises(TrainingError, match=f"damaged: {next(iter(odd_fact))}"):
            read_state(folder)
    assert tried > 80
    path.write_bytes(whole)
    assert resumed(case, folder).reason == "done"


# ---------------------------------------------------------------- longer


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "reduce_on_plateau"])
def test_a_finished_run_is_extended(case, schedule):
    """To the bit what a run of that length would have been where the schedule does not depend on the length; the rates
    from then on are those of the longer run everywhere.
    """
    changes = {"train_lr_scheduler": schedule, "train_state_every": 4, "data_cache": "memory"}
    whole, parts = engine_case.Trace(), engine_case.Trace()
    long = case.run(whole, save_lora_name=f"long-{schedule}", train_iterations=9, **changes)
    short = case.run(parts, save_lora_name=f"short-{schedule}", train_iterations=5, **changes)
    before = short.path.read_bytes()
    with pytest.raises(TrainingError, match="has done 5 steps already, and 3 are asked for"):
        resumed(case, short.folder, "train_iterations=3")
    result = resumed(case, short.folder, "train_iterations=9", "save_per_steps=6", listen=parts)
    assert result.reason == "done" and sorted(parts.losses) == list(range(1, 10))
    assert short.path.read_bytes() == before and result.path.name == f"short-{schedule}-1.safetensors"
    rates = [
        [event.rates[0] for event in trace.events if isinstance(event, Step) and event.step > 5]
        for trace in (whole, parts)
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == 4
    if schedule in ("constant", "reduce_on_plateau"):
        assert parts.losses == whole.losses
        assert all(torch.equal(value, load_file(result.path)[key]) for key, value in load_file(long.path).items())
    assert read_job(result.folder).value("train_iterations") == 9
    assert (case.places.loras / f"short-{schedule}_6steps.safetensors").is_file()


def test_epochs_are_what_is_changed_where_they_count(case):
    done = case.run(save_lora_name="epochs", train_epochs=1, train_state_every=1, data_cache="memory")
    with pytest.raises(JobError, match="train_epochs = 1 says how long this run is. Change train_epochs"):
        resumed(case, done.folder, "train_iterations=20")
    assert resumed(case, done.folder, "train_epochs=2").steps == 2 * done.steps
    assert amend(done.folder, {"train_epochs": 3}).value("train_epochs") == 3
    with pytest.raises(JobError, match="network_alpha"):
        amend(done.folder, {"network_alpha": 3})
    assert read_job(done.folder).value("train_epochs") == 3


def test_a_run_goes_on_where_its_data_moved_to(tmp_path):
    case = engine_case.make(tmp_path)
    whole = engine_case.Trace()
    case.run(whole, save_lora_name="stays", train_iterations=6, data_cache="memory")
    parts = engine_case.Trace()
    folder = stopped(case, "moves").folder
    moved = tmp_path / "elsewhere"
    shutil.move(case.pictures, moved)
    with pytest.raises(DataError, match="lora_data_directory"):
        resumed(case, folder)
    (moved / "00.txt").rename(tmp_path / "00.txt")
    with pytest.raises(TrainingError, match="changed"):
        resumed(case, folder, f"lora_data_directory={moved}")
    (tmp_path / "00.txt").rename(moved / "00.txt")
    assert resumed(case, folder, f"lora_data_directory={moved}", listen=parts).reason == "done"
    assert parts.losses == {step: loss for step, loss in whole.losses.items() if step > 3}


# ---------------------------------------------------------------- what it begins with


def test_numbers_that_are_none_are_refused_by_the_name_of_their_file(case):
    path = case.run(save_lora_name="good", train_iterations=1).path
    for value in (float("nan"), float("inf")):
        tensors = load_file(path)
        next(held for held in tensors.values() if held.dim() > 1).view(-1)[0] = value
        save_file(tensors, path.with_name("poisoned.safetensors"))
        with pytest.raises(AdapterError, match=r"poisoned\.safetensors.*not finite"):
            case.run(save_lora_name="on", network_resume="poisoned", train_iterations=1)


def test_a_cache_that_lost_entries_gives_the_same_losses(case):
    """Encoded together or alone: an image gets the same bits."""
    changes = {"train_iterations": 4, "save_overwrite": True, "save_lora_name": "cached"}
    whole = engine_case.Trace()
    case.run(whole, **changes)
    entries = sorted(case.places.cache.glob("*.safetensors"))
    assert len(entries) >= 6
    for lost in (entries[:1], entries[1:]):
        for path in lost:
            path.unlink()
        parts = engine_case.Trace()
        case.run(parts, **changes)
        assert parts.losses == whole.losses


# ---------------------------------------------------------------- signals and pipes


@pytest.mark.everywhere
@pytest.mark.skipif(os.name == "nt", reason="Windows knows neither of these signals")
def test_the_end_of_the_terminal_and_of_the_pipe_lose_nothing(tmp_path):
    """`--json | head -1`, then SIGHUP and SIGTERM more than once: the state is written, and no traceback is shown."""
    case = engine_case.make(tmp_path)
    job = case.job_file(train_iterations=100_000, save_lora_name="piped")
    command = [sys.executable, "-m", "trainer", "train", str(job), "--output-dir", str(tmp_path / "out"), "--json"]
    child = subprocess.Popen(
        command, cwd=ROOT, env=children.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    for line in child.stdout:
        if '"event": "step"' in line:
            break
    child.stdout.close()
    child.stdout = None
    (folder,) = case.places.logs.glob("*/*-piped")
    seen = len(read_losses(folder / "piped.csv"))
    while len(read_losses(folder / "piped.csv")) < seen + 20:
        assert child.poll() is None, "a closed pipe ended the run"
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)
    _, told = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in told and "Stopping after this step" in told
    facts = read_state(folder)[1]
    assert facts["step"] == len(read_losses(folder / "piped.csv")) > 20


def test_a_state_that_was_read_no_longer_needs_its_file(case):
    """Windows replaces no file that is mapped, and the run that goes on writes its next state in this one's place."""
    folder = stopped(case, "let-go", train_iterations=3, at=2).folder
    tensors, _ = read_state(folder)
    before = {key: value.clone() for key, value in tensors.items()}
    with open(folder / "state.safetensors", "r+b") as file:  # written over in place: what is mapped changes too
        file.write(bytes(os.fstat(file.fileno()).st_size))
    assert all(torch.equal(tensors[key], value) for key, value in before.items())


@pytest.mark.parametrize(("older", "rate"), [(True, None), (False, 0.0)])
def test_a_run_of_an_older_version_trains_the_text_encoder_as_it_did(case, older, rate):
    """There 0 stood for empty; its job had no model_zero_terminal_snr yet."""
    folder = case.root / f"older-{older}"
    folder.mkdir()
    rates = {"train_textencoder_learning_rate": 0.0}
    second = {"use_2nd_pass_settings": True, "2nd pass": {**rates, "train_iterations": 5}}
    whole = {**case.job(**PAIR).to_dict(full=True), **rates, **second}
    if older:
        del whole["model_zero_terminal_snr"]
    (folder / "job.json").write_text(json.dumps(whole), encoding="utf-8")
    job = read_job(folder)
    assert [one.value("train_textencoder_learning_rate") for one in (job, job.second)] == [rate, rate]
