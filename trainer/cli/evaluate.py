"""`evaluate`: measure modes or adapter types on the painted world, and write the tables of the documentation."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ..demo.evaluate.runner import Runner, Summary, tell
from ..demo.evaluate.scenario import Suite
from ..demo.evaluate.table import insert, markdown, sweeps
from ..events import EventLog
from ..places import ROOT
from .terminal import Terminal

SUITES = ("modes", "adapters")


def evaluate(name: str, folder: Path, *, quick: bool, as_json: bool, only: str, write: bool) -> int:
    """Run one suite (the scenarios whose task or variant holds `only`); returns the exit status."""
    suite: Suite = importlib.import_module(f"..demo.evaluate.{name}", __package__).SUITE
    folder = folder / name
    scenarios = [
        scenario for scenario in suite.scenarios(folder)
        if only.lower() in f"{scenario.task} {scenario.variant}".lower()
    ]  # fmt: skip
    if not scenarios:
        print(f"No scenario of {name} holds {only!r}.")
        return 2
    log = EventLog() if as_json else EventLog(Terminal())
    runner = Runner(folder, log)
    summaries = tell(runner.summaries(scenarios, quick), _printer(as_json))
    for summary in summaries:
        picture = runner.picture(summary)
        if picture is not None and not as_json:
            print(picture)
        if picture is not None and write and summary.scenario.shown:
            shutil.copyfile(picture, ROOT / "docs" / summary.scenario.shown)
    if write:
        page = ROOT / "docs" / f"{name}.md"
        insert(page, "results", markdown(summaries))
        insert(page, "sweep", sweeps(summaries))
        print(page)
    return 0


def _printer(as_json: bool) -> Callable[[Summary], None]:
    def show(summary: Summary) -> None:
        line = summary.line()
        print(json.dumps(line) if as_json else markdown([summary]), flush=True)

    return show
