"""Flags behind preview prompts, as kohya's scripts read them, and the previews that come of them."""

from __future__ import annotations

import dataclasses

import engine_case
import pytest
import tiny
import torch
from PIL import Image

from trainer.engine import arguments
from trainer.engine.catalogue import catalogue
from trainer.engine.samples import Drawing, SampleSettings, draw, sample
from trainer.errors import JobError
from trainer.params.codec import load
from trainer.params.previews import Preview, parse_previews

pytestmark = pytest.mark.usefixtures("no_estimate")


def test_flags_are_read():
    text = "a large red circle --n bad, worse --w 128 --h 256 --s 4 --l 7.5 --d 12\n\n a cat-like -- thing --N x\nplain"
    assert parse_previews(text) == (
        Preview("a large red circle", "bad, worse", 128, 256, 4, 12, 7.5),
        Preview("a cat-like -- thing", "x"),
        Preview("plain"),
    )


@pytest.mark.parametrize(("line", "told"), [
    ("a --ss euler", "--ss in 'a --ss euler' is not known"), ("a --w 100", "multiple of 8; write 96"),
    ("a --w x", "whole number from 32"), ("a --s 0", "from 1 to 1000"), ("a --l much", "from 0 to 100"),
    ("a --d -1", "whole number from 0"), ("a --s 4 --s 5", "twice"), ("D:/kohya/prompts.txt", "name of a file"),
])  # fmt: skip
def test_what_is_wrong_is_named(line, told):
    with pytest.raises(JobError, match="sample_prompts") as caught:
        raw = {"format": 1, "lora_data_directory": "x", "sample_every": 5, "sample_prompts": f"fine\n{line}"}
        load(raw, catalogue())
    assert told in str(caught.value)


def test_previews_have_what_their_line_says(tmp_path):
    case = engine_case.make(tmp_path)
    lines = "a red circle --n blue --w 128 --h 64 --s 2 --d 9 --l 3\na red circle"
    result = case.run(train_iterations=2, sample_every=2, sample_steps=2, sample_prompts=lines, save_lora_name="p")
    paths = sorted((result.folder / "samples").iterdir())
    assert [Image.open(path).size for path in paths] == [(128, 64), (64, 64)]
    wanted = arguments.previews(case.job(sample_every=2, sample_steps=5, sample_prompts=lines))
    first, second = (dataclasses.astuple(one.settings)[:4] for one in wanted)
    assert first == ((64, 128), 2, 3.0, 9) and second == ((64, 64), 5, 7.0, 0)
    assert (wanted[0].negative, wanted[1].negative) == ("blue", "")


def test_negative_prompt_and_neighbours():
    """The negative one stands in for the empty one of guidance, and a neighbour changes nothing of a preview."""
    model = tiny.model("sd1")
    plain = SampleSettings((64, 64), steps=2, cfg=5.0)
    other = dataclasses.replace(plain, size=(64, 128))
    drawings = [Drawing("red", "", plain), Drawing("red", "blue", plain), Drawing("red", "", other)]
    alone = sample(model, ["red"], plain)[0]
    found = draw(model, drawings)
    torch.testing.assert_close(found[0], alone, atol=1e-4, rtol=1e-3)
    assert found[2].shape == (3, 64, 128)
    swapped = draw(model, [drawings[0], Drawing("red", "", plain)])
    assert (found[1] - swapped[1]).abs().max() > 1e-4


def test_the_previews_of_a_pair_have_its_size(tmp_path):
    Image.new("RGB", (100, 72)).save(tmp_path / "a.png")
    raw = {"format": 1, "mode": "ADDifT", "original image": str(tmp_path / "a.png"), "target image": "b.png"}
    assert arguments.sample_settings(load(raw, catalogue()).job).size == (72, 96)
