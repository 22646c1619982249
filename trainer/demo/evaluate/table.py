"""Summaries as the tables of the documentation, between two marks so that the prose around them stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from .runner import Result, Summary


def markdown(summaries: Sequence[Summary], details: Collection[str] = ()) -> str:
    """One table per task: a row per variant, a column per figure, mean and range over the seeds at the best rate.

    Figures named in `details` are left out.
    """
    parts = []
    for task in dict.fromkeys(summary.scenario.task for summary in summaries):
        rows = [summary for summary in summaries if summary.scenario.task == task]
        names = list(dict.fromkeys(name for row in rows for name in row.best[0].figures if name not in details))
        parts.append(f"### {task}\n")
        parts.append(f"| variant | rate | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
        parts.extend(_row(row, names) for row in rows)
        parts.append("")
    return "\n".join(parts)


def sweeps(summaries: Sequence[Summary]) -> str:
    """The sweep on one seed, a row per variant: each learning rate with the figures that have a goal; the best is bold.

    Variants without learning rates have no row.
    """
    parts = []
    for task in dict.fromkeys(summary.scenario.task for summary in summaries):
        rows = [summary for summary in summaries if summary.scenario.task == task and summary.best[0].rate]
        if not rows:
            continue
        goals = " / ".join(goal.figure for goal in rows[0].scenario.goals)
        parts.append(f"**{task}**\n\n| variant | learning rate: {goals} |\n|---|---|")
        parts.extend(f"| {row.scenario.variant} | {' · '.join(map(row_of(row), row.sweep))} |" for row in rows)
        parts.append("")
    return "\n".join(parts)


def row_of(summary: Summary) -> Callable[[Result], str]:
    """How one result of the sweep is written."""

    def written(result: Result) -> str:
        figures = " / ".join(number(result.figures.get(goal.figure, math.inf)) for goal in summary.scenario.goals)
        best = "**" if result.rate == summary.best[0].rate else ""
        return f"{best}{result.rate:g}{best}: {figures if result.figures else 'the loss broke'}"

    return written


def _row(summary: Summary, names: Sequence[str]) -> str:
    cells = []
    for name in names:
        if name not in summary.best[0].figures:
            cells.append("–")
            continue
        low, high = summary.reach(name)
        middle = number(summary.mean(name))
        between = "–" if math.isfinite(high) else " to "
        spread = "" if number(low) == number(high) else f" ({number(low)}{between}{number(high)})"
        missed = any(goal.figure == name and not goal.met(summary.mean(name)) for goal in summary.scenario.goals)
        cells.append(f"{middle}{spread}{' ✗' if missed else ''}")
    rate = f"{summary.best[0].rate:g}" if summary.best[0].rate else "–"
    return f"| {summary.scenario.variant} | {rate} | {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three figures that matter, without an exponent; a dash for what was never reached."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def insert(page: Path, mark: str, text: str) -> None:
    """Replace the text between `<!-- MARK -->` and `<!-- /MARK -->` of a page. Raises ValueError without them."""
    content = page.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if start not in content or end not in content:
        raise ValueError(f"{page.name} has no place for {mark}: write {start} and {end} into it")
    before, after = content.split(start)[0], content.split(end)[1]
    page.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")
