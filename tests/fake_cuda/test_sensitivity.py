"""That the checks of the fake card find what they are for: faults are planted in runs and in figures."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import shutil
import subprocess
import sys

import children
import pytest

from fake_cuda import library, rows, table
from fake_cuda.allowed import READINGS

pytestmark = [pytest.mark.newest, pytest.mark.fake_cuda]
MAKE = table.COMMAND + " options"
SEE = table.SEE + " options --only "
ROW, STEP = "option DoRA: fp16, LoRA fp16", "step"


@functools.cache
def planted():
    done = subprocess.run(
        [sys.executable, "-m", "fake_cuda.plants"], env=children.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(bool(library.missing()), reason=library.missing())
@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("mixed devices", ("aten::add.Tensor at engine/loop.py:gradients", "expected all tensors on one device")),
        ("mixed precisions", ("aten::mm at engine/loop.py:gradients", "torch.bfloat16, torch.float16")),
        ("low precision", ("aten::_linalg_svd at engine/loop.py:gradients", "no kernel for half precision")),
        ("read", ("a step reads the device in engine/loop.py:gradients", "allowed.py")),
        ("sized by content", ("at engine/loop.py:gradients must read the device to know its result",)),
    ],
)
def test_a_fault_planted_in_a_step_is_found_with_its_place_and_the_command_to_see_it(fault, wanted):
    plain, found = planted()["none"], planted()[fault]
    known = {ROW: plain["phases"]}
    assert table.faults("options", {ROW: plain}, known) == []
    text = "\n".join(table.faults("options", {ROW: found}, known))
    for part in (*wanted, f"options / {ROW}", f"{SEE}'{ROW}'"):
        assert part in text


def good():
    """The row of the table as a run would give it."""
    known = table.read()["options"]
    found = {row: {"phases": phases, "reads": {}, "error": ""} for row, phases in known.items()}
    return copy.deepcopy(found), known


@pytest.mark.parametrize(("figure", "name"), [*enumerate(table.FIGURES)])
def test_a_rise_of_3_percent_is_found_and_one_of_1_percent_is_not(figure, name):
    found, known = good()
    assert table.faults("options", found, known) == []
    for share, wrong in ((1.01, False), (1.03, True)):
        now, before = copy.deepcopy(found), copy.deepcopy(known)
        before[ROW][STEP][figure] = 1000
        now[ROW]["phases"][STEP][figure] = 1000 * share
        faults = table.faults("options", now, before)
        assert bool(faults) == wrong
    assert f"options / {ROW} / {STEP}: {name} rose from 1000 to 1030" in faults
    assert any(MAKE in line for line in faults)


def test_a_missing_row_and_a_missing_phase_are_found():
    found, known = good()
    short = {row: phases for row, phases in known.items() if row != ROW}
    assert f"options / {ROW}: is not in the table" in table.faults("options", found, short)
    fewer = {row: one for row, one in found.items() if row != ROW}
    assert f"options / {ROW}: is in the table, but is no run" in table.faults("options", fewer, known)
    del found[ROW]["phases"][STEP]
    faults = table.faults("options", found, known)
    assert any(line.startswith(f"options / {ROW}: has the phases") for line in faults) and MAKE in faults[-1]


def test_an_entry_of_allowed_that_no_step_needs_is_found():
    row = "optimizer Prodigy: bf16, LoRA bf16"
    (place,) = (one.place for one in READINGS if "Prodigy" in one.rows)
    known = {row: {STEP: [1, 0, 1, 1.0]}}
    run = {"phases": known[row], "reads": {place: 1}, "error": ""}
    assert table.faults("optimizers", {row: run}, known) == []
    stale = table.faults("optimizers", {row: {**run, "reads": {}}}, known)
    assert stale[0] == f"optimizers / {row}: no step reads in {place} any more; take it out of fake_cuda/allowed.py"


def test_every_registered_thing_has_a_row():
    """So that a new one fails until it has. bitsandbytes has kernels of its own, which no fake card can follow."""
    from trainer.adapters.base import ADAPTERS
    from trainer.modes.base import MODES
    from trainer.optim.optimizers import OPTIMIZERS
    from trainer.params.network import INITS
    from trainer.stages.base import STAGES

    known = table.read()
    assert set(known) == set(rows.GROUPS) == {group for together in rows.TOGETHER for group in together}
    for kind, group, names in (
        ("type", "types", ADAPTERS.names()),
        ("mode", "modes", MODES.names()),
        ("optimizer", "optimizers", [name for name, one in OPTIMIZERS.items() if one.package != "bitsandbytes"]),
        ("stage", "stages", [*(name for name in STAGES.names() if name != "start"), *set(INITS) - {"default"}]),
    ):
        there = {row.removeprefix(f"{kind} ").partition(": ")[0] for row in known[group]}
        missing = set(names) - there
        assert not missing, f"no run of {kind} {', '.join(missing)}: add it to fake_cuda/rows.py, then {table.COMMAND}"


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        ({"g++": None}, "needs g++"),
        ({"torch": "2.3.1"}, f"written for torch {library.WANTED}, this is 2.3.1"),
        ({"platform": "win32"}, "only tried on Linux"),
    ],
)
def test_where_there_can_be_no_card_the_reason_is_given(monkeypatch, plant, reason):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: plant.get("torch", f"{library.WANTED}.0"))
    monkeypatch.setattr(sys, "platform", plant.get("platform", "linux"))
    monkeypatch.setattr(shutil, "which", lambda name: plant.get(name, f"/usr/bin/{name}"))
    assert reason in library.missing()
