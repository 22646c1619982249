"""What a run looks like on a terminal, and in a file that its output goes to."""

from __future__ import annotations

import io

import pytest

from trainer.cli import terminal
from trainer.cli.terminal import Terminal, worded
from trainer.events import Preflight, Stage, Step


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), ([], "none"), ({}, "none"), (True, "yes"), (False, "no"), (150.0, "150"), (0.25, "0.25"),
        ({"unet": 192, "te1": 18}, "unet 192, te1 18"), (("a.png", "b.png"), "a.png, b.png"), (606208, "606208"),
        (["10 (left out)", None], "10 (left out), none"), ("bf16", "bf16"),
    ],
)  # fmt: skip
def test_a_report_has_no_values_of_python(value: object, text: str) -> None:
    assert worded(value) == text
    stream = io.StringIO()
    Terminal(stream)(Preflight({"name": value}))
    assert stream.getvalue() == f"  name  {text}\n"


def test_a_bar_in_a_file_is_written_at_most_once_per_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    stream = io.StringIO()
    shown = Terminal(stream)
    for done in range(101):
        shown(Stage("encoding images", done, 100))
        now[0] += 0.02
    assert stream.getvalue() == "", "a stage of two seconds is not worth a line"
    for step in range(1, 601):
        shown(Step(step, 600, 0.1, 0.1, (1e-4,), 1.0, 1.0))
        now[0] += 0.1
    written = stream.getvalue().count("training:")
    assert 5 <= written <= 60 / terminal.TO_A_FILE + 2
    assert "600/600" in stream.getvalue()
