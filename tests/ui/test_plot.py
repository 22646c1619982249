"""Logs of ours and of TrainTrain's, and the figure made of them."""

from __future__ import annotations

import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from trainer.engine.csvlog import CsvLog
from trainer.errors import DataError, JobError
from trainer.events import Step

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
from trainer.ui import plot

TRAINTRAIN = "\n".join(
    [
        "network_rank,16", "network_alpha,8", "train_learning_rate,1e-4", "train_iterations,4",
        "train_lr_scheduler,cosine", "model_version,sd1", "train_optimizer,AdamW", "save_lora_name,cat",
        "Step,Loss,Learning Rate 1,Learning Rate 2", "1,0.5,1e-4,5e-5", "2,0.25,9e-5,4e-5", "3,nan,8e-5,3e-5",
        "4,0.125,7e-5,2e-5", "",
    ]
)  # fmt: skip


def test_traintrains_log() -> None:
    log = plot.read_log("cat.csv", TRAINTRAIN)
    assert log.settings["train_optimizer"] == "AdamW" and log.settings["save_lora_name"] == "cat"
    assert log.rows["Step"].tolist() == [1, 2, 4] and log.rows["Loss"].tolist() == [0.5, 0.25, 0.125]
    assert log.rates == ["Learning Rate 1", "Learning Rate 2"] and log.rows["Learning Rate 2"].tolist()[0] == 5e-5


def test_our_log_while_it_is_written(tmp_path: Path) -> None:
    csv = CsvLog(tmp_path / "run.csv", {"network_rank": 4})
    for number in (1, 2, 3):
        csv(Step(number, 9, 1 / number, 1 / number, (1e-3,), 1.0, 1.0))
    csv.close()
    whole = plot.load_log(tmp_path / "run.csv", "run.csv")
    assert whole.rows["Loss"].tolist() == [1.0, 0.5, 1 / 3]
    half = plot.read_log("run.csv", (tmp_path / "run.csv").read_text()[:-9])
    assert half.rows["Loss"].tolist() == [1.0, 0.5], "a line without its end is not read"
    assert plot.read_log("begun.csv", "network_rank,4\nStep,Loss,Learning Rate 1\n").rows.empty


def test_what_is_no_log() -> None:
    with pytest.raises(DataError, match="is not a loss log"):
        plot.read_log("prices.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match="There is no log yet"):
        plot.draw([], plot.PlotSettings())
    for smoothing in ("1", "-0.1", "much"):
        with pytest.raises(JobError, match="from 0 to below 1"):
            plot.parse_plot(smoothing, False, True)


def test_the_average_is_what_it_says() -> None:
    import pandas

    numbers, weight = [random.Random(4).random() for _ in range(40)], 0.9
    found = plot.smoothed(pandas.Series(numbers), weight).tolist()
    for end in (1, 2, 17, 40):
        weights = [weight ** (end - 1 - at) for at in range(end)]
        wanted = sum(w * x for w, x in zip(weights, numbers[:end], strict=True)) / sum(weights)
        assert found[end - 1] == pytest.approx(wanted, rel=1e-12)
    assert plot.smoothed(pandas.Series(numbers), 0.0).tolist() == pytest.approx(numbers)


def test_the_figure_is_a_part_of_the_page() -> None:
    chance = random.Random(1)
    rows = "".join(f"{step},{chance.random()},1e-4\n" for step in range(1, 7001))
    log = plot.read_log("2026-01-01/120000-a/a.csv", f"Step,Loss,Learning Rate 1\n{rows}")
    other = plot.read_log("2026-01-02/130000-a/a.csv", "Step,Loss\n1,0.5\n2,0.25\n3,0.125\n")
    svg = plot.draw([log, other], plot.PlotSettings(0.9, logarithmic=True))
    tree = ElementTree.fromstring(svg)
    names = {"s": "http://www.w3.org/2000/svg"}
    assert tree.get("width") is None and tree.get("viewBox")
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "every colour is a variable of the page"
    assert {"var(--atelier-series-1)", "var(--atelier-series-2)"} <= set(re.findall(r"stroke: (var\([^)]*\))", svg))
    assert "<style" not in svg and "<script" not in svg and "<metadata" not in svg
    assert all(name.startswith("atelier_") for name in re.findall(r'\bid="([^"]*)"', svg))
    raw = tree.find(".//s:g[@id='atelier_raw_0']/s:path", names)
    assert raw is not None and 500 < raw.get("d", "").count("L") <= plot.MOST_POINTS
    assert tree.find(".//s:g[@id='atelier_loss_1']", names) is not None
    words = {text.text for text in tree.iterfind(".//s:text", names)}
    assert {"Step", "Loss", "Learning rate", "a (120000-a)", "a (130000-a)"} <= words
    assert plot.draw([log, other], plot.PlotSettings(0.9, logarithmic=True)) == svg, "the same again"
    assert 'id="atelier_raw_0"' not in plot.draw([log], plot.PlotSettings(0.0, rates=False))


def test_logs_of_strangers_are_read_cell_by_cell() -> None:
    """An open quote, cells that are no numbers, more cells than titles, numbers beyond any axis."""
    text = 'Step,Loss,Learning Rate 1\n1,"0.5,1e-4\n2,0.25,x\n3,0.5,1,2,3\n4,1e308,1e-4\n1e300,0.5,1\n5,0.125,1e-4\n'
    log = plot.read_log("a.csv", text)
    assert log.rows["Step"].tolist() == [2, 5] and log.rows["Loss"].tolist() == [0.25, 0.125]
    assert plot.read_log("a.csv", "Step,\n1,\n").rows.empty and plot.read_log("a.csv", "Step,\ud800\n1,\n").rows.empty


@pytest.mark.parametrize("name", ["$x^{$.csv", "a$b$.csv", "\ud800.csv", "\x01.csv", "_hidden.csv"])
def test_names_of_logs_are_letters_and_no_formula(name: str) -> None:
    logs = [plot.read_log(name, TRAINTRAIN), plot.read_log("other.csv", TRAINTRAIN)]
    svg = plot.draw(logs, plot.PlotSettings())
    words = "".join(ElementTree.fromstring(svg).itertext())
    plain = name.removesuffix(".csv").replace("\ud800", "·").replace("\x01", "·")
    assert plain in words and "other" in words
