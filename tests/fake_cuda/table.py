"""The table under version control: what each phase of each run did on the card. `python -m fake_cuda.table` makes it
anew.

    python -m fake_cuda.table                 all groups
    python -m fake_cuda.table SDXL modes      these groups; what the table has of the others stays
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import children

from . import rows
from .allowed import allowed

FIGURES = ("kernels", "to card", "from card", "MiB at most")
"""Operators that launch a kernel, copies to the card, readings of it, and the most bytes of tensors on it."""
TOLERANCE = 0.02
FILE = Path(__file__).with_name("table.json")
ROOT = Path(__file__).parents[2]
COMMAND = "PYTHONPATH=.:tests:tests/support python -m fake_cuda.table"
SEE = "PYTHONPATH=.:tests:tests/support python -m fake_cuda.run"

Phases = dict[str, dict[str, list[float]]]
"""Row → phase → figures."""
Table = dict[str, Phases]
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


def measured(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The runs of groups, in one process of their own: group → row → what `run.make` gives. Raises RuntimeError when
    it fails.
    """
    paths = [*map(str, children.FOLDERS), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "fake_cuda.run", *groups, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, dict[str, Any]] = json.loads(lines[-1])
    return found


def rises(group: str, found: dict[str, Any], known: Phases) -> Iterator[str]:
    """A sentence for every figure that rose by more than the tolerance over what is known of a group, and for rows and
    phases that differ.
    """
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


def faults(group: str, found: dict[str, Any], known: Phases) -> list[str]:
    """What is wrong with the runs of a group, against what the table knows of it; the last sentences say what to do.
    [] when all is well.
    """
    wrong = [f"{group} / {row}: {one['error']}" for row, one in found.items() if one["error"]]
    for row, one in found.items():
        places, may = set(one["reads"]), allowed(row)
        wrong += [
            f"{group} / {row}: a step reads the device in {place}, which fake_cuda/allowed.py does not name"
            for place in sorted(places - may)
        ]
        wrong += [
            f"{group} / {row}: no step reads in {place} any more; take it out of fake_cuda/allowed.py"
            for place in sorted(may - places)
        ]
    wrong += rises(group, found, known)
    if wrong:
        row = next(row for row in (*found, *known) if any(one.startswith(f"{group} / {row}") for one in wrong))
        wrong.append(f"To see one run: {SEE} {shlex.quote(group)} --only {shlex.quote(row)}")
        wrong.append(f"If figures, rows or phases are meant to change: {COMMAND} {shlex.quote(group)}")
    return wrong


def main(groups: list[str]) -> None:
    """Measure groups and write the table."""
    chosen = groups or list(rows.GROUPS)
    for together in rows.TOGETHER:
        several = [group for group in together if group in chosen]
        for group, of_group in measured(several).items() if several else ():
            phases = {row: one["phases"] for row, one in of_group.items()}
            table = {**read(), group: phases}
            write({name: table[name] for name in rows.GROUPS if name in table})
            print(f"{group}: {len(phases)} rows", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
