"""What docs/guide/modes.md tells to type is a job of the mode it stands under, with nothing to warn of.

The fields that it and docs/guide/images.md name exist.
"""

from __future__ import annotations

import re
import shlex

import pytest

from trainer.cli import jobs
from trainer.engine.catalogue import catalogue
from trainer.events import EventLog, Note
from trainer.params.core import Task
from trainer.places import ROOT, Places

PAGE = (ROOT / "docs" / "guide" / "modes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))


def test_every_mode_has_a_recipe():
    assert set(catalogue().modes) - {"LoRA"} <= set(SECTIONS)
    assert set(catalogue().modes) == set(re.findall(r"^\| .* \| ([\w-]+) \|$", PAGE, re.M)) - {"mode"}


@pytest.mark.parametrize("mode", sorted(set(catalogue().modes) - {"LoRA"}))
def test_the_command_is_a_job_of_the_mode(mode, tmp_path):
    (line,) = re.findall(r"^python launch.py train (.+)$", SECTIONS[mode], re.M)
    name, *words = shlex.split(line)
    assert words[::2] == ["--set"] * (len(words) // 2)
    told = []
    log = EventLog(lambda event: told.append(event.text) if isinstance(event, Note) and event.level != "info" else None)
    places = Places.standalone(tmp_path)
    job = jobs.request(name, jobs.Given(words[1::2]), places, resume=False, dry=True, log=log).job
    assert job[Task].mode == mode and not told


@pytest.mark.parametrize("mode", sorted(SECTIONS))
def test_the_fields_it_names_are_fields_of_the_mode(mode):
    """Names in italics that are made of several words, as the tab spells them."""
    table = catalogue()
    spelt = {parameter.key.replace("_", " ").lower(): parameter for parameter in table.parameters}
    named = {name.lower() for name in re.findall(r"\*([a-z0-9]+(?: [a-zA-Z0-9]+)+)\*", SECTIONS[mode])}
    assert named and named <= set(spelt)
    if mode in table.modes:
        tags = table.tags(table.modes[mode], "lierla")
        assert [name for name in named if not spelt[name].shown_in(tags)] == []


def test_the_fields_of_the_page_about_images_are_shown_in_mode_lora():
    page, table = (ROOT / "docs" / "guide" / "images.md").read_text(encoding="utf-8"), catalogue()
    spelt = {parameter.key.split("(")[0].replace("_", " ").lower(): parameter for parameter in table.parameters}
    named = {name for name in re.findall(r"\*([a-z0-9]+(?: [a-z0-9]+)+)\*", page)}
    assert len(named) > 15 and named <= set(spelt)
    assert [name for name in named if not spelt[name].shown_in(table.tags(table.modes["LoRA"], "lierla"))] == []
