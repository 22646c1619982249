"""The table under version control: what each phase of each run did on the card. `python -m fake_cuda.table` makes it
anew.

    python -m fake_cuda.table                 all groups
    python -m fake_cuda.table SDXL modes      these groups; what the table has of the others stays
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import rows

FIGURES = ("kernels", "to card", "from card", "MiB at most")
"""Operators that launch a kernel, copies to the card, readings of it, and the most bytes of tensors on it."""
TOLERANCE = 0.02
FILE = Path(__file__).with_name("table.json")
ROOT = Path(__file__).parents[2]
COMMAND = "PYTHONPATH=.:tests python -m fake_cuda.table"

Table = dict[str, dict[str, dict[str, list[float]]]]
"""Group → row → phase → figures."""


def read() -> Table:
    """The table as it is under version control."""
    table: Table = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return table


def write(table: Table) -> None:
    """Write the table, a row a line."""
    groups = []
    for group, of_group in table.items():
        lines = [f"  {json.dumps(row)}: {json.dumps(phases)}" for row, phases in of_group.items()]
        groups.append(f"{json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(groups) + "\n}\n", encoding="utf-8")


def measured(group: str) -> dict[str, Any]:
    """The runs of a group, in a process of their own: `run.make` by row. Raises RuntimeError when it fails."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "fake_cuda.run", group, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def rises(group: str, found: dict[str, Any]) -> Iterator[str]:
    """A sentence for every figure that rose by more than the tolerance, and for rows and phases that differ."""
    known = read().get(group, {})
    for row in (*found, *(row for row in known if row not in found)):
        if (row in found) != (row in known):
            yield f"{group} / {row}: {'is not in the table' if row in found else 'is in the table, but is no run'}"
            continue
        new, old = found[row]["phases"], known[row]
        if new.keys() != old.keys():
            yield f"{group} / {row}: has the phases {list(new)}, the table {list(old)}"
        for phase in (phase for phase in new if phase in old):
            for name, now, before in zip(FIGURES, new[phase], old[phase], strict=True):
                if now > before * (1 + TOLERANCE):
                    yield f"{group} / {row} / {phase}: {name} rose from {before:g} to {now:g}"


def main(groups: list[str]) -> None:
    """Measure groups and write the table."""
    for group in groups or list(rows.GROUPS):
        phases = {row: one["phases"] for row, one in measured(group).items()}
        table = {**read(), group: phases}
        write({name: table[name] for name in rows.GROUPS if name in table})
        print(f"{group}: {len(phases)} rows", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
