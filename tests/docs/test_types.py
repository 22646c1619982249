"""What docs/guide/types.md tells to type works, and speaks of fields that the type in question shows."""

from __future__ import annotations

import re
import shlex

import pytest

from trainer.cli import jobs
from trainer.cli.main import _parser
from trainer.engine.catalogue import catalogue
from trainer.events import EventLog, Note
from trainer.params.core import Network
from trainer.params.network import NetworkOptions
from trainer.places import ROOT, Places
from trainer.stages.abm import AbmParams
from trainer.stages.lalora import LaloraParams

PAGE = (ROOT / "docs" / "guide" / "types.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
COMMANDS = re.findall(r"^python launch.py (\w+) (.+)$", PAGE, re.M)
TABLE = catalogue()
OTHERS = {"DoRA", "T-LoRA", "LaLoRA", "ABM", "The form of the file"}


def types_of(title: str) -> set[str]:
    return set(re.findall(r"\w+", title)) & set(TABLE.choices["network_type"])


def job_of(words: str, folder):
    """(the job, what was warned of) of a `train` command in a folder with the files it names."""
    name, *rest = shlex.split(words)
    assert rest[::2] == ["--set"] * (len(rest) // 2)
    for file in re.findall(r"(?:basis|context)_path=(\S+)", words):
        (folder / file).touch()
    warned: list[str] = []

    def hear(event) -> None:
        if isinstance(event, Note) and event.level != "info":
            warned.append(event.text)

    places = Places.standalone(folder)
    return jobs.request(name, jobs.Given(rest[1::2]), places, resume=False, dry=True, log=EventLog(hear)).job, warned


def test_every_type_has_a_section_and_a_line_in_the_table() -> None:
    known = set(TABLE.choices["network_type"])
    titles = [title for title in SECTIONS if title not in OTHERS]
    assert sorted(kind for title in titles for kind in types_of(title)) == sorted(known)
    rows = re.findall(r"^\| .+ \| ([\w, ]+) \|$", PAGE, re.M)
    assert {kind for row in rows for kind in row.split(", ")} - {"type"} == known


@pytest.mark.parametrize("title", [title for title in SECTIONS if title != "The form of the file"])
def test_its_commands_train_what_it_is_about(title: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = re.findall(r"^python launch.py train (.+)$", SECTIONS[title], re.M)
    made = [job_of(words, tmp_path) for words in given]
    assert made and not any(warned for _, warned in made)
    if title in OTHERS:
        ((job, _),) = made
        on = {"DoRA": "use_dora", "T-LoRA": "network_timestep_rank", "LaLoRA": "lalora_lambda", "ABM": "abm_enabled"}
        assert job.value(on[title])
    else:
        assert {job[Network].network_type for job, _ in made} == types_of(title)


@pytest.mark.parametrize(("command", "words"), [(name, words) for name, words in COMMANDS if name != "train"])
def test_the_tools_take_these_words(command: str, words: str) -> None:
    options = _parser().parse_args([command, *shlex.split(words)])
    assert options.out.suffix == ".safetensors"


@pytest.mark.parametrize("title", sorted(SECTIONS))
def test_the_fields_it_names_are_shown_with_the_type(title: str) -> None:
    """Names in italics that are made of several words, as the tab spells them."""
    spelt = {parameter.key.replace("_", " ").lower(): parameter for parameter in TABLE.parameters}
    named = set(re.findall(r"\*([a-z0-9]+(?: [a-zA-Z0-9]+)+)\*", SECTIONS[title]))
    assert named and named <= set(spelt)
    kinds = types_of(title) or {"lierla", "c3lier"}
    tags = frozenset().union(*(TABLE.tags(TABLE.modes["LoRA"], kind) for kind in kinds))
    assert [name for name in named if not spelt[name].shown_in(tags)] == []


def test_every_setting_of_types_and_their_starts_is_on_the_page() -> None:
    """Dropouts and the numbers of single blocks explain themselves; how ABM trains is for those who know it."""
    plain = {"network_dropout", "network_rank_dropout", "network_module_dropout", "network_max_norm",
             "loraplus_te_lr_ratio", "network_block_ranks", "network_block_alphas", "network_block_lrs",
             "network_name_filter", "abm_lr", "abm_margin", "abm_weight_strategy", "abm_batch_size"}  # fmt: skip
    sections = (NetworkOptions, AbmParams, LaloraParams)
    names = {parameter.attribute for parameter in TABLE.parameters if parameter.section in sections
             or parameter.section.__module__.startswith(("trainer.adapters", "trainer.params.spaces"))}  # fmt: skip
    lacking = [name for name in names - plain if f"*{name.replace('_', ' ')}*" not in PAGE.replace("\n  ", " ")]
    assert lacking == [] and plain <= names
