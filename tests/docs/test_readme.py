"""What the README and the page of commands say is there, is there; every link of the documentation leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.cli.main import main
from trainer.engine.catalogue import catalogue
from trainer.optim.optimizers import OPTIMIZERS
from trainer.optim.schedulers import SCHEDULERS
from trainer.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
STANDALONE = (ROOT / "docs" / "guide" / "standalone.md").read_text(encoding="utf-8")
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
LARGEST_PICTURE = 200_000
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCED = re.compile(r"^```.*?^```$", re.S | re.M)
SPELT = {"lierla": "`lierla`", "c3lier": "`c3lier`", "eh": "EH", "null": "Null-LoRA", "experts": "mixture of experts"}


def test_modes_types_and_counts() -> None:
    table = catalogue()
    assert [mode for mode in table.modes if f"**{mode}**" not in README] == []
    lower = README.lower()
    assert [kind for kind in table.types if SPELT.get(kind, kind).lower() not in lower] == []
    assert f"{len(list(OPTIMIZERS.items()))} optimizers and {len(list(SCHEDULERS.items()))} learning-rate" in README
    presets = {path.stem for path in (ROOT / "presets").glob("*.json")}
    assert set(re.findall(r"preset \*(\w+)\*", README)) <= presets


def test_every_command_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its flags; without a command it is the app. What follows three spaces is explanation."""
    typed = [
        line.split("   ")[0].split()[2:]
        for line in (README + STANDALONE).splitlines()
        if line.startswith("python launch.py")
    ]
    found = [(words[0] if words and not words[0].startswith("-") else "app", words) for words in typed]
    assert len({command for command, _ in found}) > 8
    for command, words in found:
        if command == "test":
            continue
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0, command
        shown = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in shown] == [], command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_page_lead_to_files_and_headings(page: Path) -> None:
    for path, heading in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{path} is not there"
        assert not heading or heading in anchors(target), f"{path} has no heading #{heading}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / path).resolve() for path, _ in LINK.findall(index)}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {ROOT / "docs" / "index.md"} <= linked


def test_images_are_used_and_small() -> None:
    named = {Path(path).name for page in PAGES for path, _ in LINK.findall(page.read_text(encoding="utf-8"))}
    images = list((ROOT / "docs" / "images").iterdir())
    assert images and all(image.name in named and image.stat().st_size <= LARGEST_PICTURE for image in images)
