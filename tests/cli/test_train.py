"""`train` on the command line: the first words, refusals before the engine is there, the demo by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from children import environment

from trainer.cli import jobs
from trainer.engine.catalogue import catalogue
from trainer.errors import JobError
from trainer.params.codec import load
from trainer.params.core import Images, Save, Task
from trainer.places import BASE_PICTURES

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
