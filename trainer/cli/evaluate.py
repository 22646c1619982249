"""`evaluate`: measure modes or adapter types on the painted world, and write the tables of the documentation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..demo.evaluate.runner import Runner, Summary, tell
from ..demo.evaluate.table import insert, markdown, sweeps
from ..demo.evaluate.workers import Chosen, suite_of, summaries
from ..events import EventLog
from ..places import ROOT
from .terminal import Terminal

SUITES = ("modes", "adapters")


@dataclass(frozen=True)
class How:
    """How a suite is run and told: `quick` is one seed at the shipped settings, `only` what names must hold."""

    quick: bool = False
    as_json: bool = False
    only: str = ""
    write: bool = False
    workers: int = 1


def evaluate(name: str, folder: Path, how: How) -> int:
    """Run one suite; returns the exit status."""
    if how.write and (how.quick or how.only):
        print("--write replaces whole tables in docs/lab/: give it without --quick and --only. What they ran is kept.")
        return 2
    suite, folder = suite_of(name), folder / name
    wanted = [
        place for place, scenario in enumerate(suite.scenarios(folder))
        if how.only.lower() in f"{scenario.task} {scenario.variant}".lower()
    ]  # fmt: skip
    if not wanted:
        print(f"No scenario of {name} holds {how.only!r}.")
        return 2
    suite.prepare(folder)
    runner = Runner(folder, EventLog() if how.as_json else EventLog(Terminal()))
    found = tell(summaries(Chosen(name, folder, tuple(wanted)), runner, how.quick, how.workers), _printer(how.as_json))
    for summary in found:
        picture = runner.picture(summary)
        if picture is not None and not how.as_json:
            print(picture)
        if picture is not None and how.write and summary.scenario.shown:
            shutil.copyfile(picture, ROOT / "docs" / "images" / summary.scenario.shown)
    if how.write:
        page = ROOT / "docs" / "lab" / f"{name}.md"
        insert(page, "results", markdown(found, suite.details))
        insert(page, "sweep", sweeps(found))
        print(page)
    return 0


def _printer(as_json: bool) -> Callable[[Summary], None]:
    def show(summary: Summary) -> None:
        line = summary.line()
        print(json.dumps(line) if as_json else markdown([summary]), flush=True)

    return show
