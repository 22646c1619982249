"""Whole runs of the engine on a card that is not there: nothing mixes devices or precisions, no step waits for the
device, and nothing grew (see README.md beside this file).
"""

from __future__ import annotations

import pytest

from fake_cuda import library, rows, table
from fake_cuda.allowed import READINGS, allowed

pytestmark = [
    pytest.mark.newest,
    pytest.mark.fake_cuda,
    pytest.mark.skipif(bool(library.missing()), reason=library.missing()),
]
CEILING = 6.4 * 1024
"""MiB of tensors that no phase of SDXL 1024 with rank 16, batch 1 and checkpointing may exceed: a card of 8 GB has that
beside what CUDA itself takes."""


@pytest.mark.parametrize("groups", rows.TOGETHER, ids=" ".join)
def test_every_run_works_without_waiting_and_takes_no_more_than_before(groups):
    found, known = table.measured(groups), table.read()
    faults = [fault for group in groups for fault in table.faults(group, found[group], known.get(group, {}))]
    assert not faults, "\n".join(faults)
    for name, row in found.get("stages", {}).items():
        stage = name.removeprefix("stage ").partition(": ")[0]
        assert row["stages"] == [stage if stage in rows.STAGES else "start"], name


def test_sdxl_fits_on_a_card_of_8_gb():
    """In the table, which the test above holds to what happens."""
    (phases,) = table.read()["SDXL"].values()
    assert {phase: line[3] for phase, line in phases.items() if line[3] > CEILING} == {}


def test_every_allowed_reading_belongs_to_a_run():
    names = [row for of_group in table.read().values() for row in of_group]
    assert [one for one in READINGS if not any(one.place in allowed(name) for name in names)] == []
