"""`train` on the command line: the first words, refusals before the engine is there, the demo by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from children import environment

from trainer.cli import jobs
from trainer.engine.catalogue import catalogue
from trainer.engine.run import run
from trainer.errors import JobError
from trainer.events import EventLog
from trainer.params.codec import load, load_rest
from trainer.params.core import Images, Network, Save, Task, Train
from trainer.places import BASE_PICTURES, Places

REFUSED = """
import sys
from trainer.cli.main import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "diffusers", "transformers", "trainer.engine.run"} & set(sys.modules))
print(status, *heavy)
"""


@pytest.mark.parametrize(
    ("words", "loaded"),
    [(["nowhere.json"], []), (["demo", "--set", "network_rank=many"], ["torch"])],
)
def test_what_is_wrong_is_refused_before_the_engine_is_loaded(words: list[str], loaded: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, "train", *words], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", *loaded], done.stderr
    assert done.stderr.splitlines()[0] == f"Checking {words[0]}."


def test_the_demo_brings_its_model_and_pictures_to_the_command_line_as_to_the_page() -> None:
    job = load(jobs.raw_job("demo"), catalogue()).job
    assert job[Task].model == "demo" and job[Images].lora_data_directory == str(BASE_PICTURES)
    assert job[Save].save_overwrite
    with pytest.raises(JobError, match="neither a file nor a preset"):
        jobs.raw_job("dem0")
    other = load(jobs.raw_job("LoRA"), catalogue(), complete=False).job
    assert not other[Task].model and not other[Images].lora_data_directory


def wrong_files(places: Places) -> dict[str, object]:
    """Settings whose every file is absent, but for the LoRA, whose name is taken."""
    places.loras.mkdir(parents=True)
    (places.loras / "cat.safetensors").touch()
    files = {"model": "none", "vae": "no.vae", "te": "clip_none", "lora_data_directory": "/nowhere"}
    return {"format": 1, "mode": "LoRA", "save_lora_name": "cat", "network_resume": "none.safetensors", **files}


OF_FILES = {"save_lora_name", "model", "vae", "te", "lora_data_directory", "network_resume"}


@pytest.mark.parametrize("dry", [False, True])
def test_wrong_files_are_named_with_wrong_numbers_in_one_answer(tmp_path: Path, dry: bool) -> None:
    places = Places.standalone(tmp_path / "models").under(tmp_path / "out")
    job = tmp_path / "job.json"
    job.write_text(json.dumps({**wrong_files(places), "network_rank": "many", "train_batch_size": 0}))
    log, nothing = EventLog(), jobs.Given(["train_iterations=0"])
    with pytest.raises(JobError) as caught:
        jobs.request(str(job), nothing, places, resume=False, dry=dry, log=log)
    fields = [problem.field for problem in caught.value.problems]
    assert sorted(fields) == sorted(OF_FILES | {"network_rank", "train_batch_size", "train_iterations"})
    right = jobs.Given(["network_rank=4", "train_batch_size=1", "train_iterations=9"])
    asked = jobs.request(str(job), right, places, resume=False, dry=dry, log=log)
    with pytest.raises(JobError) as caught:
        run(asked, log)
    assert {problem.field for problem in caught.value.problems} == OF_FILES


def test_a_wrong_second_pass_hides_no_wrong_files(tmp_path: Path) -> None:
    places = Places.standalone(tmp_path / "models").under(tmp_path / "out")
    job = tmp_path / "job.json"
    two = {"mode": "Difference", "use_2nd_pass_settings": True, "2nd pass": {"train_iterations": "many"}}
    named = {"original image": str(tmp_path / "a.png"), "target image": str(tmp_path / "b.png")}
    job.write_text(json.dumps({"format": 1, "model": "none", **two, **named}))
    with pytest.raises(JobError) as caught:
        jobs.request(str(job), jobs.Given(), places, resume=False, dry=True, log=EventLog())
    fields = sorted(problem.field for problem in caught.value.problems)
    assert fields == ["2nd pass.train_iterations", "model", "original image", "target image"]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"mode": "LoRA", "network_rank": "many"}, True),
        ({"mode": "LoRA", "train_min_timesteps": 900, "train_max_timesteps": 100}, True),
        ({"mode": "LoRA", "save_lora_name": "a.safetensors", "image_size": 7, "unknown": 1}, True),
        ({"mode": "none of ours", "network_rank": 4}, False),
        ({"mode": "LoRA", "format": 99}, False),
    ],
)
def test_what_is_right_in_wrong_settings_is_a_job(given: dict[str, object], made: bool) -> None:
    raw = {"format": 1, "train_iterations": 7, **given}
    with pytest.raises(JobError) as caught:
        load(raw, catalogue())
    rest = load_rest(raw, caught.value.problems, catalogue())
    assert (rest is not None) == made
    if rest is not None:
        assert rest[Train].train_iterations == 7 and rest[Train].train_min_timesteps == 0
        assert rest[Network].network_rank == Network.network_rank and not rest[Save].save_lora_name
