"""Pairs of pictures: who belongs together, what is refused by name, and where the two differ."""

from __future__ import annotations

import numpy as np
import pair_case
import pytest
import torch
from PIL import Image

from trainer.data.cache import TensorCache
from trainer.data.pairs import (
    Encoding,
    MaskRule,
    build_pairs,
    difference_mask,
    find_pairs,
    opaque_mask,
    single_pair,
)
from trainer.data.settings import ImageSettings
from trainer.errors import DataError


def settings(folder, **changes):
    return ImageSettings(folder, size=(64, 64), min_length=64, buckets_step=64, **changes)


def grey(folder, name, size=(64, 64), level=100):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(folder / name)


def encode(pixels):
    mean = torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]
    return mean, mean * 0 + 0.1


def encoding():
    return Encoding(encode, "vae", TensorCache(None))


def test_partners_are_found_by_name_also_in_folders_and_other_formats(tmp_path):
    for name, level in (("a.png", 1), ("a-b.bmp", 2), ("x/c.png", 3), ("x/c-b.png", 4), ("x/c-b.txt", None)):
        if level:
            grey((tmp_path / name).parent, (tmp_path / name).name, level=level)
        else:
            (tmp_path / name).write_text("a caption")
    found = find_pairs(settings(tmp_path, trigger="sks"), "-b")
    assert [picture.name for picture in found.originals.pictures] == ["a.png", "x/c.png"]
    assert [picture.name for picture in found.targets.pictures] == ["a-b.bmp", "x/c-b.png"]
    assert [picture.caption for picture in found.targets.pictures] == ["sks", "sks, a caption"]
    assert found.reverted().originals is found.targets


def test_everything_that_is_wrong_is_told_by_name_at_once(tmp_path):
    for name, level in (("a.png", 1), ("b.png", 1), ("b_t.png", 1), ("c.png", 1), ("d_t.png", 2)):
        grey(tmp_path, name, level=level)
    grey(tmp_path, "c_t.png", (64, 48), 5)
    grey(tmp_path, "e.png", level=1)
    grey(tmp_path, "e.bmp", level=1)
    grey(tmp_path, "f.png", level=1), grey(tmp_path, "f_t.png", level=2), grey(tmp_path, "f_t_t.png", level=3)
    with pytest.raises(DataError) as caught:
        find_pairs(settings(tmp_path), "_t")
    text = str(caught.value)
    for words in (
        "a.png (no a_t beside it)", "b.png and b_t.png (they show the same", "64×64 and 64×48", "d_t.png (no d_t_t",
        "e.bmp and e.png (two images of one name)", "f_t.png (it is the target of one",
    ):  # fmt: skip
        assert words in text
    assert "diff_target_name" in text


def test_a_broken_half_leaves_the_pair_out_when_that_is_asked_for(tmp_path):
    pair_case.write_pair(tmp_path)
    pair_case.write_pair(tmp_path, name="b", seed=2)
    whole = (tmp_path / "b_t.png").read_bytes()
    (tmp_path / "b_t.png").write_bytes(whole[:20])  # its header is gone
    with pytest.raises(DataError, match="b_t.png"):
        find_pairs(settings(tmp_path), "_t")
    found = find_pairs(settings(tmp_path, skip_broken=True), "_t")
    assert [picture.name for picture in found.originals.pictures] == ["a.png"]
    (tmp_path / "b_t.png").write_bytes(whole[: len(whole) * 2 // 3])  # its end is gone: seen when it is decoded
    found = find_pairs(settings(tmp_path, skip_broken=True), "_t")
    pairs = build_pairs(settings(tmp_path, skip_broken=True), found, encoding(), MaskRule())
    assert [pairs.item(index).picture.name for index in range(len(pairs.pairs))] == ["a.png"]


def test_latents_of_a_pair_stand_side_by_side(tmp_path):
    pair_case.write_pair(tmp_path)
    pair_case.write_pair(tmp_path, name="b", seed=2)
    found = find_pairs(settings(tmp_path, mirroring=True), "_t")
    pairs = build_pairs(settings(tmp_path, mirroring=True), found, encoding())
    assert len(pairs.pairs) == 4
    for index in range(4):
        item = pairs.item(index)
        target = item.picture.path.with_name(item.picture.path.stem + "_t.png")
        for path, mean in zip((item.picture.path, target), pairs.latents([index])[::2], strict=True):
            pixels = np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1
            pixels = pixels[:, ::-1] if item.flipped else pixels
            blocks = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))
            np.testing.assert_allclose(mean[0, :3].permute(1, 2, 0), blocks, atol=1e-5)
    assert pairs.mask([0]) is None


COUNTS = [(1, 4, [4]), (3, 4, [4, 4, 4]), (5, 2, [2, 2, 1]), (2, 2, [2])]


@pytest.mark.parametrize(("count", "batch", "expected"), COUNTS)
def test_few_pairs_fill_whole_batches_and_all_count_alike(tmp_path, count, batch, expected):
    for number in range(count):
        pair_case.write_pair(tmp_path, name=f"p{number}", seed=number)
    plan = build_pairs(settings(tmp_path), find_pairs(settings(tmp_path), "_t"), encoding()).plan(3, batch, fill=True)
    epoch = plan.epoch(0)
    assert sorted(map(len, epoch), reverse=True) == expected
    counts = np.bincount([index for one in epoch for index in one])
    assert len(counts) == count and len(set(counts)) == 1


def test_the_mask_by_hand():
    """A difference of 4 levels in each channel (12 in all) counts, one of 3 (9) does not."""
    before = torch.zeros(3, 64, 64)
    after = before.clone()
    after[:, 20, 28] = 4 / 127.5
    after[:, 60, 60] = 3 / 127.5
    expected = torch.zeros(1, 8, 8)
    expected[:, 1:4, 2:5] = 1  # latent (2, 3) and its neighbours
    assert torch.equal(difference_mask(before, after, (8, 8)), expected)
    alone = torch.zeros(1, 8, 8)
    alone[:, 2, 3] = 1
    assert torch.equal(difference_mask(before, after, (8, 8), grow=0), alone)


def test_traintrains_mask_is_the_originals_transparency_by_hand():
    """More than a tenth opaque, looked at in each latent's upper left pixel; without transparency all of it."""
    alpha = torch.ones(64, 64)
    alpha[16, 24] = 0.1  # latent (2, 3)
    alpha[17:24, 25:32] = 0  # beside it, where nothing is looked at
    expected = torch.ones(1, 8, 8)
    expected[:, 2, 3] = 0
    assert torch.equal(opaque_mask(alpha, (8, 8)), expected)
    assert torch.equal(opaque_mask(None, (8, 8)), torch.ones(1, 8, 8))


def test_a_difference_that_is_cut_off_is_told_by_name(tmp_path):
    """The last of 72 rows differ; the middle 64 of them are trained."""
    for name, level in (("a.png", 10), ("a_t.png", 200)):
        grey(tmp_path, name, (64, 72), 10)
        with Image.open(tmp_path / name) as image:
            image.paste((level,) * 3, (0, 70, 64, 72))
            image.save(tmp_path / name)
    found = find_pairs(settings(tmp_path), "_t", masked=True)
    build_pairs(settings(tmp_path), found, encoding())
    with pytest.raises(DataError, match="a.png and its target do not differ clearly.*64×64.*diff_use_diff_mask"):
        build_pairs(settings(tmp_path), found, encoding(), MaskRule())


def test_single_pictures_keep_their_own_size(tmp_path):
    for name, level in (("a.png", 10), ("b.png", 200)):
        grey(tmp_path, name, (83, 132), level)
    found = single_pair(tmp_path / "a.png", tmp_path / "b.png", ("one", ""))
    pairs = build_pairs(ImageSettings(tmp_path, own_size=True), found, encoding(), MaskRule())
    assert pairs.item(0).bucket == (80, 128) and pairs.captions([0]) == (("one",), ("",))
    assert pairs.latents([0])[0].shape == (1, 4, 16, 10) and pairs.mask([0]).eq(1).all()
    assert pairs.sizes([0])[0].original == (132, 83)
