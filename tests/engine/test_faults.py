"""A full disk, a folder that goes, a file that may not be written: the run goes on, ends tidily, or says why."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import engine_case
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer import writing
from trainer.engine import csvlog, disk, memory, state
from trainer.engine.costs import CostWatch
from trainer.engine.csvlog import CsvLog, read_losses
from trainer.engine.passes import plan_passes
from trainer.engine.preflight import file_problems
from trainer.engine.resume import read_job
from trainer.engine.run import Request, run
from trainer.engine.trackers import TRACKERS
from trainer.errors import JobError, TrainingError
from trainer.events import Event, EventLog, Finished, Note, Preflight, Step
from trainer.models.load import load_model

pytestmark = pytest.mark.usefixtures("no_estimate")

CHANGES: dict[str, object] = {
    "train_iterations": 12, "train_state_every": 3, "save_per_steps": 4, "sample_every": 4, "sample_steps": 1,
    "sample_prompts": "a circle", "data_cache": "memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> engine_case.Case:
    return engine_case.make(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def whole(case: engine_case.Case) -> dict[str, bytes]:
    """The LoRA of the run that nothing happened to, tensor by tensor."""
    request = Request(case.job(save_lora_name="whole", **CHANGES), case.places, estimates=False)
    return tensors(run(request, EventLog()).path)


def tensors(path: Path | None) -> dict[str, bytes]:
    assert path is not None
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def at_step(number: int, act: Callable[[], object]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == number:
            act()

    return listen


class Told:
    """A listener that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and event.level == "warning":
            self.warnings.append(event.text)

    def has(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.warnings)


class Disk:
    """Every way of ours to write a file, broken from `break_` to `mend` for the files that `only` picks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, only: Callable[[Path], bool]) -> None:
        self.number, self.only, self.broken = number, only, False
        init, save, disk = writing.Draft.__init__, state.save_file, self

        def draft(made: writing.Draft, target: Path) -> None:
            disk.refuse(target)
            init(made, target)

        def save_file(tensors: object, path: Path, metadata: object) -> None:
            if disk.broken and disk.only(path):
                raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
            save(tensors, path, metadata)  # type: ignore[arg-type]

        class Appended:
            def __init__(self, path: Path, mode: str) -> None:
                self.path, self.file = path, open(path, mode)  # noqa: SIM115
                self.flush, self.close = self.file.flush, self.file.close

            def write(self, content: bytes) -> int:
                if disk.broken:
                    self.file.write(content[:3])  # what still fitted
                disk.refuse(self.path)
                return self.file.write(content)

        monkeypatch.setattr(writing.Draft, "__init__", draft)
        monkeypatch.setattr(state, "save_file", save_file)
        monkeypatch.setattr(csvlog, "open", Appended, raising=False)

    def refuse(self, target: Path) -> None:
        if self.broken and self.only(Path(target)):
            raise OSError(self.number, os.strerror(self.number), str(target))

    def break_(self) -> None:
        self.broken = True

    def mend(self) -> None:
        self.broken = False


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["full", "denied"])
def test_a_disk_that_takes_nothing_for_a_while_costs_only_the_files_of_that_while(case, whole, monkeypatch, number):
    told, broken = Told(), Disk(monkeypatch, number, lambda path: True)
    name, why = f"while{number}", {errno.ENOSPC: "the disk is full", errno.EACCES: "permission denied"}[number]
    result = case.run(told, at_step(2, broken.break_), at_step(7, broken.mend), save_lora_name=name, **CHANGES)
    assert result.reason == "done" and tensors(result.path) == whole
    assert told.has("resume state", why) and told.has(f"{name}_4steps", why) and told.has("step 4", why)
    assert told.has(f"{name}.csv", why) and len(told.warnings) == 4
    assert [step for step, _ in read_losses(result.folder / f"{name}.csv")] == list(range(1, 13))
    assert sorted(path.name for path in (result.folder / "samples").iterdir()) == ["000008_0.png", "000012_0.png"]
    assert (result.folder / "state.safetensors").is_file()
    assert not [path for path in case.places.loras.iterdir() if path.name == f"{name}_4steps.safetensors"]
    assert not list(case.root.rglob("*.tmp"))


def test_where_the_lora_cannot_be_written_the_run_is_resumed_after_room_was_made(case, whole, monkeypatch):
    changes = {**CHANGES, "train_state_every": 0, "save_lora_name": "noroom"}
    broken = Disk(monkeypatch, errno.ENOSPC, lambda path: path.parent == case.places.loras)
    folders: list[Path] = []

    def listen(event: Event) -> None:
        folders.extend([Path(event.folder)] if hasattr(event, "folder") else [])

    with pytest.raises(TrainingError, match=r"noroom.*the disk is full.*resume that run, and the file is written"):
        case.run(listen, at_step(9, broken.break_), **changes)
    broken.mend()
    result = case.run(resume=folders[0], **changes)
    assert result.reason == "done" and tensors(result.path) == whole
    assert not (folders[0] / "state.safetensors").exists(), "train_state_every = 0 keeps none"


def test_a_state_that_cannot_be_written_at_the_end_does_not_make_a_finished_run_fail(case, whole, monkeypatch):
    told = Told()
    broken = Disk(monkeypatch, errno.EROFS, lambda path: path.suffix == ".tmp" and path.stem == "state")
    result = case.run(told, at_step(10, broken.break_), save_lora_name="nostate", **CHANGES)
    assert result.reason == "done" and tensors(result.path) == whole
    assert told.has("resume state", "the file system is read-only") and len(told.warnings) == 1


def test_a_run_folder_that_was_removed_is_made_anew(case, whole):
    folders: list[Path] = []

    def listen(event: Event) -> None:
        folders.extend([Path(event.folder)] if hasattr(event, "folder") else [])

    told = Told()
    result = case.run(
        told, listen, at_step(7, lambda: shutil.rmtree(case.places.logs)), save_lora_name="gone", **CHANGES
    )
    assert tensors(result.path) == whole and not told.warnings and result.folder == folders[0]
    assert [step for step, _ in read_losses(result.folder / "gone.csv")] == list(range(1, 13))
    job = read_job(result.folder)
    assert run(Request(job, case.places, resume=result.folder), EventLog()).path == result.path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 4 MB, where root can make one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    able = sys.platform == "linux" and shutil.which("mount") is not None
    if not able or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_full_disk(case, whole, small_disk):
    """The same with a file system that is full: what it did not take is warned of, and nothing half-written stays."""
    told, filler = Told(), small_disk / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096) == 4096:
                    pass
            except OSError:
                return

    job = case.job(save_lora_name="real", **CHANGES)
    log = EventLog(told, at_step(2, fill), at_step(9, filler.unlink))
    result = run(Request(job, case.places.under(small_disk / "out")), log)
    assert result.reason == "done" and tensors(result.path) == whole
    assert told.has("resume state", "the disk is full") and told.has("real_4steps", "the disk is full")
    assert [step for step, _ in read_losses(result.folder / "real.csv")] == list(range(1, 13))
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob(".tmp*"))


def test_folders_and_room_are_looked_at_before_the_first_step(case, tmp_path, monkeypatch):
    """All at once with what else is wrong, and nothing is left of the try."""
    (tmp_path / "file").write_text("in the way")
    places = case.places.replace(loras=tmp_path / "file" / "Lora", logs=tmp_path / "new" / "logs")
    changes = {**CHANGES, "save_as_json": True, "train_model_precision": "int8"}
    broken = Disk(monkeypatch, errno.EROFS, lambda path: case.places.json in path.parents)
    broken.break_()
    with pytest.raises(JobError) as caught:
        run(Request(case.job(**changes), places, dry=True), EventLog())
    found = {problem.field: problem.message for problem in caught.value.problems}
    assert set(found) == {"save_lora_name", "save_as_json", "train_model_precision"}
    assert "a file is where a folder should be" in found["save_lora_name"] and "read-only" in found["save_as_json"]
    assert os.listdir(tmp_path) == ["file"]
    broken.mend()

    free = 300_000  # one LoRA file of 202 kB has room, three of them and a state have not
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    for dry in (True, False):
        with pytest.raises(JobError, match="0.3 MB free, and this run needs") as caught:
            case.run(dry=dry, save_lora_name="tight", **CHANGES)
        assert [problem.field for problem in caught.value.problems] == ["save_lora_name", "train_state_every"]
    assert not list(case.places.logs.rglob("*tight*")), "a run that was refused leaves no folder"


def test_a_disk_without_room_for_one_lora_is_told_before_the_model_is_loaded(case, monkeypatch):
    """At Start too; with what else is wrong; and where there is room for one, nothing is refused on a guess."""
    size = case.run(save_lora_name="one_file", train_iterations=1).path.stat().st_size
    trace, free = engine_case.Trace(), size // 2
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    job = case.job(save_lora_name="none", train_iterations=1)
    with pytest.raises(JobError, match=r"0\.1 MB free, and one LoRA file of these settings takes 0\.\d MB") as caught:
        run(Request(job, case.places), EventLog(trace))
    assert [problem.field for problem in caught.value.problems] == ["save_lora_name"]
    assert [type(event) for event in trace.events] == [Finished]
    assert file_problems(job, case.places, models=True) == caught.value.problems
    free = size * 2
    assert file_problems(job, case.places, models=True) == ()
    larger = case.job(save_lora_name="none", network_rank=64, save_precision="fp32")
    assert [problem.field for problem in file_problems(larger, case.places, models=True)] == ["save_lora_name"]


def test_the_estimate_of_the_room_is_near_what_is_written(case):
    result = case.run(save_lora_name="sized", train_iterations=3, train_state_every=1, data_cache="memory")
    job = case.job(train_iterations=3, train_state_every=1)
    session = engine_case.session(case, job, load_model(case.model))
    try:
        (plan,) = plan_passes(job)
        lora, states, previews = disk.shares(plan, session, case.places)
    finally:
        session.network.eject()
    written = result.path.stat().st_size, 2 * (result.folder / "state.safetensors").stat().st_size
    assert written[0] <= lora.size < 1.5 * written[0] + 65_536
    assert written[1] <= states.size < 1.5 * written[1] + 2 * 65_536 and previews.size == 0


def test_a_tracker_that_fails_hears_nothing_more(case, monkeypatch):
    heard: list[str] = []

    class Failing:
        def __init__(self, *given: object) -> None:
            heard.append("made")

        def __call__(self, event: Event) -> None:
            if isinstance(event, Step):
                heard.append("step")
                raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            heard.append("closed")

    monkeypatch.setitem(TRACKERS, "tensorboard", Failing)
    told = Told()
    result = case.run(told, save_lora_name="tracked", train_iterations=2, logging_trackers=["tensorboard"])
    assert result.reason == "done" and heard == ["made", "step"]
    assert told.has("logging_trackers = tensorboard", "the disk is full") and len(told.warnings) == 1


def test_notes_about_memory_and_costs_that_cannot_be_kept_do_no_harm(case, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder, told = tmp_path / "file" / "cache", []
    assert memory.remembered(folder, {"layout": "a"}, lambda: 5) == 5
    watch = CostWatch(case.job(), torch.device("cpu"), folder, 0.0, told.append)
    for event in (Preflight({}), Finished("done", "lora.safetensors", 3)):
        watch(event)
    assert len(told) == 1 and "a file is where a folder should be" in told[0]


# ---------------------------------------------------------------- the log


def _row(number: int) -> Step:
    return Step(number, 9, 1 / number, 1 / number, (1e-3,), 1.0, 1.0)


@pytest.mark.parametrize("encoding", ["cp932", "utf-16", "utf-8-sig"])
def test_a_log_in_another_encoding_goes_on(tmp_path, encoding):
    path = tmp_path / "run.csv"
    log = CsvLog(path, {"save_lora_name": "猫"})
    for number in (1, 2, 3):
        log(_row(number))
    log.close()
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    told: list[str] = []
    log = CsvLog(path, {}, 2, told.append)
    log(_row(3))
    log.close()
    assert read_losses(path) == [(1, 1.0), (2, 0.5), (3, 1 / 3)] and not told


def test_what_is_no_log_is_kept_aside(tmp_path):
    path, told = tmp_path / "run.csv", []
    path.write_bytes(b"\xff\x00\xb9garbage;of\n;another,program\n")
    log = CsvLog(path, {}, 2, told.append)
    log(_row(3))
    log.close()
    assert read_losses(path) == [(3, 1 / 3)] and len(told) == 1 and "run-1.csv" in told[0]
    assert (tmp_path / "run-1.csv").read_bytes().startswith(b"\xff\x00\xb9")


def test_a_log_is_never_shorter_than_what_is_kept_of_it(tmp_path, monkeypatch):
    """A run that is killed while it takes up its log leaves the log that was there."""
    path = tmp_path / "run.csv"
    log = CsvLog(path, {})
    for number in (1, 2, 3):
        log(_row(number))
    log.close()
    before = path.read_bytes()

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        CsvLog(path, {}, 2)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.csv"]
