"""The memory report against what a whole run is seen to hold, phase by phase (see README.md beside this file)."""

from __future__ import annotations

import json
import subprocess
import sys

import children
import pytest

from fake_cuda import library

pytestmark = [
    pytest.mark.newest,
    pytest.mark.fake_cuda,
    pytest.mark.skipif(bool(library.missing()), reason=library.missing()),
]
WITHIN = 0.15
PHASES = {"encoding images", "encoding texts", "training", "generating a preview"}


def test_every_figure_of_the_memory_report_is_within_15_percent_of_what_is_counted():
    done = subprocess.run(
        [sys.executable, "-m", "fake_cuda.report", "quick", "--json"],
        env=children.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 12 and {phase for figures in found.values() for phase in figures} == PHASES
    wrong = [
        f"{row}, {phase}: {told / 2**20:.1f} MiB told, {counted / 2**20:.1f} counted"
        for row, figures in found.items()
        for phase, (told, counted) in figures.items()
        if abs(told / counted - 1) > WITHIN
    ]
    assert not wrong, "\n".join(wrong)
