"""Loss logs as a figure: the losses faint, their moving average, the learning rates below. Reads TrainTrain's logs too.

The figure is SVG whose colours are CSS variables of the page, so that it fits every theme and dark mode.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, JobError, Problem
from ..jsontext import JsonError, read_bytes

if TYPE_CHECKING:
    import pandas

MOST_LOGS = 12
MOST_POINTS = 3000
"""Points of one line; more cannot be seen and make the page slow."""

MOST_COLUMNS, LONGEST_LABEL = 10, 120
LARGEST, LARGEST_LOG = 1e30, 64 * 2**20
"""A number that no axis can show any more, and bytes of a log: ten million steps."""

SERIES = 6
# Colours that are names: no figure uses them, and the page's variables take their place in the text of the SVG.
_TEXT, _GRID = "#00fe01", "#00fe02"
_SERIES = tuple(f"#00fe1{number}" for number in range(SERIES))
_VARIABLES = {
    _TEXT: "var(--body-text-color)",
    _GRID: "var(--border-color-primary)",
    **{colour: f"var(--atelier-series-{number + 1})" for number, colour in enumerate(_SERIES)},
}
_DRAWING = threading.Lock()


@dataclass(frozen=True)
class Log:
    """One log: its name, the settings block at its head, and a row per step (`Step`, `Loss`, learning rates)."""

    name: str
    settings: Mapping[str, str]
    rows: pandas.DataFrame

    @property
    def rates(self) -> list[str]:
        """The columns that are learning rates."""
        return [str(column) for column in self.rows.columns[2:]]


@dataclass(frozen=True)
class PlotSettings:
    """`smoothing`: weight of the past in the moving average, 0 to below 1; `logarithmic`: of the loss axis."""

    smoothing: float = 0.98
    logarithmic: bool = False
    rates: bool = True


def parse_plot(smoothing: str, logarithmic: bool, rates: bool) -> PlotSettings:
    """Settings as they are typed. Raises JobError."""
    try:
        value = float(smoothing or 0)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        right = "must be a number from 0 to below 1; 0.98 averages over about 50 steps."
        raise JobError([Problem("smoothing", smoothing, right)])
    return PlotSettings(value, logarithmic, rates)


def read_log(name: str, text: str) -> Log:
    """A log of ours or of TrainTrain's from its text. Raises DataError when it is none."""
    import pandas

    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Step,")), None)
    if start is None:
        raise DataError(f"{name} is not a loss log: it has no line that begins with Step. Choose a CSV log of a run.")
    settings = dict(line.partition(",")[::2] for line in lines[:start] if line)
    if not text.endswith("\n"):
        lines.pop()  # a run is writing it
    titles = lines[start].split(",")[:MOST_COLUMNS] if start < len(lines) else []
    rows = [_numbers(line, len(titles)) for line in lines[start + 1 :]]
    table = pandas.DataFrame([row for row in rows if row is not None], columns=range(len(titles)), dtype=float)
    table = table.dropna(axis=1, how="all")
    if not {0, 1} <= set(table.columns):
        return Log(name, settings, pandas.DataFrame({"Step": [], "Loss": []}, dtype=float))
    table.columns = ["Step", "Loss", *(f"Learning Rate {number + 1}" for number in range(len(table.columns) - 2))]
    return Log(name, settings, table.sort_values("Step", kind="stable").reset_index(drop=True))


def _numbers(line: str, count: int) -> list[float] | None:
    """The numbers of a row, NaN for what is none; None for a row without step or loss, or with more than the title."""
    cells = line.split(",")
    if len(cells) > count:
        return None
    found = [_number(cell) for cell in cells] + [math.nan] * (count - len(cells))
    return None if len(found) < 2 or math.isnan(found[0]) or math.isnan(found[1]) else found


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if abs(value) < LARGEST else math.nan


def load_log(path: Path, name: str) -> Log:
    """The log in a file. Raises DataError."""
    try:
        return read_log(name or path.name, read_bytes(path, LARGEST_LOG).decode("utf-8", "replace"))
    except JsonError as error:
        raise DataError(f"{name or path.name} {error}.") from error


def live_log(name: str, points: Sequence[Sequence[Any]]) -> Log:
    """The log of a run that writes none, from the points of its curve (see `jobs.curve`)."""
    import pandas

    rates = max((len(point[3]) for point in points), default=0)
    columns = ["Step", "Loss", *(f"Learning Rate {number + 1}" for number in range(rates))]
    rows = [[point[0], point[1], *point[3], *[None] * (rates - len(point[3]))] for point in points]
    return Log(name, {}, pandas.DataFrame(rows, columns=columns, dtype=float))


def smoothed(losses: pandas.Series[float], smoothing: float) -> pandas.Series[float]:
    """Moving average whose weights fall by `smoothing` per step into the past, normalised to 1 from the first step."""
    return losses.ewm(alpha=1 - smoothing, adjust=True).mean()


def draw(logs: Sequence[Log], settings: PlotSettings) -> str:
    """SVG of the logs over one another. Raises DataError when there is nothing to draw."""
    if not logs:
        raise DataError("There is no log yet. Each run writes one, unless logging_save_csv is off.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with_rates = settings.rates and any(log.rates for log in logs)
    with _DRAWING, rc_context({"svg.fonttype": "none", "svg.hashsalt": "atelier"}):
        figure = Figure(figsize=(9, 5.6 if with_rates else 4.4), layout="constrained")
        figure.patch.set_alpha(0)
        ratios = {"height_ratios": [3, 1]} if with_rates else {}
        axes = figure.subplots(2 if with_rates else 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
        for number, (log, label) in enumerate(zip(logs, _labels(logs), strict=True)):
            _draw_losses(axes[0], log, label, settings, number)
            if with_rates:
                _draw_rates(axes[1], log, number)
        _finish(list(axes), settings, len(logs))
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return _as_part_of_a_page(target.getvalue())


def _labels(logs: Sequence[Log]) -> list[str]:
    """File names without folder and ending; with the folder where two would be the same. Nothing in them is markup."""
    stems = [log.name.rsplit("/", 1)[-1].removesuffix(".csv") for log in logs]
    folders = [log.name.rpartition("/")[0].rsplit("/", 1)[-1] for log in logs]
    return [
        _as_text(f"{stem} ({folder})" if folder and stems.count(stem) > 1 else stem)
        for stem, folder in zip(stems, folders, strict=True)
    ]


def _as_text(label: str) -> str:
    """A label as matplotlib draws it letter by letter: no formula between dollars, no halves of letters, and not left
    out of the legend for a `_` at its beginning."""
    plain = "".join(letter if letter.isprintable() else "·" for letter in label[:LONGEST_LABEL])
    return ("\u200a" if plain.startswith("_") else "") + plain.replace("$", r"\$")


def _draw_losses(axis: Any, log: Log, label: str, settings: PlotSettings, number: int) -> None:
    steps, losses = log.rows.iloc[:, 0], log.rows.iloc[:, 1]
    colour, dashes = _SERIES[number % SERIES], "-" if number < SERIES else "--"
    picked = slice(None, None, max(-(-len(steps) // MOST_POINTS), 1))
    if settings.smoothing:
        axis.plot(steps[picked], losses[picked], color=colour, linewidth=0.8, alpha=0.3, gid=f"atelier_raw_{number}")
    average = smoothed(losses, settings.smoothing)[picked]
    axis.plot(steps[picked], average, dashes, color=colour, linewidth=1.8, label=label, gid=f"atelier_loss_{number}")


def _draw_rates(axis: Any, log: Log, number: int) -> None:
    steps = log.rows.iloc[:, 0]
    picked = slice(None, None, max(-(-len(steps) // MOST_POINTS), 1))
    for column, dashes in zip(log.rates, ("-", "--", ":", "-."), strict=False):
        colour = _SERIES[number % SERIES]
        axis.plot(steps[picked], log.rows[column][picked], dashes, color=colour, linewidth=1.4, alpha=0.9)


def _finish(axes: Sequence[Any], settings: PlotSettings, logs: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = ("Loss", "Learning rate")
    plain = FuncFormatter(lambda value, _: f"{value:.4g}")
    for axis, name in zip(axes, names, strict=False):
        axis.patch.set_alpha(0)
        axis.grid(True, color=_GRID, linewidth=0.6)
        axis.tick_params(which="both", colors=_TEXT, labelsize=9)
        axis.set_ylabel(name, color=_TEXT, fontsize=10)
        for spine in axis.spines.values():
            spine.set_color(_GRID)
    if settings.logarithmic:
        axes[0].set_yscale("log")
        low, high = axes[0].get_ylim()
        if high < 30 * low:  # else numbers between the powers of ten would stand on one another
            axes[0].yaxis.set_minor_formatter(plain)
    for axis in axes:
        axis.yaxis.set_major_formatter(plain)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("Step", color=_TEXT, fontsize=10)
    if logs > 1:
        axes[0].legend(frameon=False, labelcolor=_TEXT, fontsize=9)


def _as_part_of_a_page(svg: str) -> str:
    """The `<svg>` element alone, as wide as its place, in the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    rest = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'( id="|href="#|url\(#)(?!atelier_)', r"\1atelier_plot_", rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    return f"{head}>{rest}"
