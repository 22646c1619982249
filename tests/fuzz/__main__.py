"""The command: see the package."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))  # the helpers of the tests

import torch

from .harness import Tally, Watch, run, tried, workplace
from .readers import READERS, open_reader, shares

KINDS = ("accepted", "refused", "traceback", "hang", "memory", "outside")


def main() -> int:
    """Run the command; 1 when there is any failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Feed every reader with mutated inputs.")
    parser.add_argument("--count", type=int, default=10_000, help="inputs altogether (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument("--only", choices=sorted(READERS), action="append", help="this reader alone; may be repeated")
    parser.add_argument("--at", type=int, help="this one input of the reader, with its traceback")
    given = parser.parse_args()
    os.environ.setdefault("MPLCONFIGDIR", "/tmp")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    names = given.only or list(READERS)
    with workplace() as root:
        watch = Watch(root)
        readers = {}
        counts: dict[str, int] = {}
        for name in names:
            readers[name] = open_reader(name, root)
        counts = shares(given.count, {name: reader.cost for name, reader in readers.items()})
        if given.at is not None:
            kind, told, seconds, more = tried(readers[names[0]], Random(f"{given.seed}/{names[0]}/{given.at}"), watch)
            print(f"{kind}: {seconds:.2f} s, {more / 2**20:.0f} MB\n{told}")
            return int(kind not in ("accepted", "refused"))
        bad = 0
        print(
            f"{'reader':18} {'tried':>7} " + " ".join(f"{kind:>9}" for kind in KINDS) + "  slowest  memory  all",
            flush=True,
        )
        whole = Tally()
        for name, reader in readers.items():
            began = time.monotonic()
            tally = run(reader, given.seed, range(counts[name]), watch)
            _row(name, tally, time.monotonic() - began)
            whole.counts.update(tally.counts)
            whole.slowest, whole.most = max(whole.slowest, tally.slowest), max(whole.most, tally.most)
            bad += len(tally.failures)
            _told(name, given.seed, tally)
        _row("all", whole, 0.0)
    return int(bad > 0)


def _row(name: str, tally: Tally, wall: float) -> None:
    numbers = " ".join(f"{tally.counts[kind]:9}" for kind in KINDS)
    tried = sum(tally.counts.values())
    print(
        f"{name:18} {tried:7} {numbers}  {tally.slowest:5.1f} s {tally.most / 2**20:5.0f} MB {wall:5.0f} s", flush=True
    )


def _told(name: str, seed: int, tally: Tally) -> None:
    """Every place once, with how often and the number of the first input."""
    places: Counter[str] = Counter()
    first: dict[str, int] = {}
    for kind, number, told in tally.failures:
        lines = [line.strip() for line in told.strip().splitlines()]
        ours = [line for line in lines if line.startswith("File") and "/trainer/" in line]
        where = ours[-1].rpartition("/trainer/")[2] if ours else ""
        place = f"{kind} {where} {lines[-1][:160] if lines else ''}"
        places[place] += 1
        first.setdefault(place, number)
    for place, often in places.most_common(25):
        print(
            f"    {often} × {place}\n        python -m tests.fuzz --only {name} --at {first[place]} --seed {seed}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
