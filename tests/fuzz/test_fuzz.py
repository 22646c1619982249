"""Some thousands of mutated inputs for every reader; `python -m tests.fuzz` tries as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("matplotlib")
from fuzz.harness import Reader, Refused, Watch, run, workplace
from fuzz.readers import READERS, open_reader
from trainer.errors import DataError

SECONDS = {"models": 3.0, "model_folders": 3.0, "states": 3.0, "model_parts": 1.5, "csv_logs": 2.0}
"""Seconds of computing for the slow readers; the others get one."""
MOST = 400
SEED = 20261130


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Watch]]:
    tmp_path_factory.getbasetemp()  # made outside of what is watched
    with workplace() as root:
        yield root, Watch(root)


@pytest.mark.newest
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_every_input_is_accepted_or_refused(place: tuple[Path, Watch], name: str) -> None:
    root, watch = place
    reader = open_reader(name, root)
    count = min(MOST, int(SECONDS.get(name, 1.0) / reader.cost))
    tally = run(reader, SEED, range(count), watch)
    again = f"python -m tests.fuzz --only {name} --seed {SEED} --at"
    assert not tally.failures, "\n".join(f"{again} {at}: {kind}\n{told}" for kind, at, told in tally.failures[:3])
    assert sum(tally.counts.values()) == count and tally.counts["refused"] + tally.counts["accepted"] == count


class Faulty:
    """A reader with every fault that is looked for."""

    name, cost = "faulty", 0.001

    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def make(self, rng):
        kind = rng.randrange(6)
        return lambda: self._read(kind)

    def _read(self, kind: int) -> None:
        if kind == 0:
            raise KeyError("a")
        if kind == 1:
            raise DataError("no")
        if kind == 2:
            raise Refused
        if kind == 3:
            bytearray(700 * 2**20)[::4096] = b"1" * (700 * 2**8)
        if kind == 4:
            (self.outside / "x").write_text("x")


def test_the_harness_sees_what_it_looks_for(place: tuple[Path, Watch], tmp_path: Path) -> None:
    reader: Reader = Faulty(tmp_path)
    tally = run(reader, 0, range(40), place[1])
    assert {kind for kind, _, _ in tally.failures} >= {"traceback", "outside"}
    assert tally.counts["refused"] and tally.counts["accepted"]
    if tally.most:  # where the system tells how much memory there was
        assert "memory" in tally.counts
    assert run(reader, 0, range(40), place[1]).failures == tally.failures  # seed and number decide
