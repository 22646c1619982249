"""What the README says is there, is there."""

from __future__ import annotations

import re

import pytest

from trainer.cli.main import main
from trainer.engine.catalogue import catalogue
from trainer.optim.optimizers import OPTIMIZERS
from trainer.optim.schedulers import SCHEDULERS
from trainer.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGEST_PICTURE = 200_000
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
    typed = [line.split("   ")[0].split()[2:] for line in README.splitlines() if line.startswith("python launch.py")]
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


def test_links_lead_somewhere_and_pictures_are_small() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).is_file(), path
        if path.endswith(".png"):
            assert (ROOT / path).stat().st_size <= LARGEST_PICTURE, path
