"""The demonstration as a user runs it: the new word is learned, what was known mostly stays, all is written."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.cli.main import main


def test_the_demo_teaches_its_word_and_measures_it(tmp_path, capfd):
    assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    *lines, last = capfd.readouterr().out.strip().splitlines()
    named = dict(line.split(maxsplit=1) for line in lines[-3:])
    assert all(Path(named[name]).is_file() for name in ("LoRA:", "Image:", "Log:"))

    found = json.loads(last)
    before, after = found["asked_before"], found["asked_after"]
    assert before["n"] == after["n"] == 100
    assert before["ci95"][1] < after["ci95"][0] and after["rate"] >= 0.8
    kept = found["unrelated_before"]
    assert kept["colour"]["n"] == 200 and kept["background"]["rate"] >= 0.95
    assert kept["colour"]["rate"] >= 0.9 and kept["shape"]["rate"] >= 0.85
    assert found["worst_fall"] <= 0.05
    assert found["steps"] <= 150
