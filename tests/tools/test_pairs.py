"""Pairs as the page shows them: cut as in training, what differs marked, what is wrong said."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.engine.catalogue import catalogue
from trainer.params.codec import load
from trainer.tools.pair_preview import RED_RGB, PairView, pair_views


def drawn(path: Path, size: tuple[int, int], changed: bool = False) -> Path:
    """A grey picture, with a quarter of it another colour when it is changed."""
    picture = Image.new("RGB", size, (120, 120, 120))
    if changed:
        picture.paste((220, 120, 40), (0, 0, size[0] // 2, size[1] // 2))
    picture.save(path)
    return path


def views(**settings: object) -> tuple[list[PairView], int, str]:
    return pair_views(load({"format": 1, **settings}, catalogue(), complete=False).job)


def test_two_files_side_by_side_with_what_differs(tmp_path: Path) -> None:
    one, other = drawn(tmp_path / "a.png", (128, 64)), drawn(tmp_path / "b.png", (128, 64), changed=True)
    (view,), count, problem = views(mode="ADDifT", **{"original image": str(one), "target image": str(other)})
    assert (count, problem, view.names, view.size, view.bucket) == (1, "", ("a.png", "b.png"), (128, 64), (128, 64))
    assert view.share == pytest.approx(0.25, abs=0.02)
    assert view.original is not None and view.target is not None and view.difference is not None
    assert view.original.getpixel((10, 10)) == (120, 120, 120) and view.target.getpixel((10, 10)) == (220, 120, 40)
    assert view.difference.getpixel((10, 10)) == RED_RGB and len(set(view.difference.getpixel((100, 50)))) == 1


def test_a_folder_shows_its_first_pairs_in_their_buckets(tmp_path: Path) -> None:
    for number in range(8):
        drawn(tmp_path / f"{number}.png", (256, 128))
        drawn(tmp_path / f"{number}_after.png", (256, 128), changed=True)
    cut: dict[str, object] = {"image_size(height, width)": 192, "image_buckets_step": 64, "image_min_length": 64}
    folder = {"lora_data_directory": str(tmp_path), "diff_target_name": "_after", **cut}
    found, count, problem = views(mode="Multi-ADDifT", **folder)
    assert (len(found), count, problem) == (6, 8, "")
    assert found[0].names == ("0.png", "0_after.png") and found[0].size == (256, 128)
    assert found[0].bucket is not None and found[0].original is not None
    assert found[0].bucket[0] / found[0].bucket[1] == 1.5 and found[0].original.size == found[0].bucket


def test_what_makes_no_pair_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    one, small = drawn(tmp_path / "a.png", (128, 64)), drawn(tmp_path / "small.png", (64, 64))
    (half,), count, problem = views(mode="ADDifT", **{"original image": str(one)})
    assert (count, problem, half.target, half.names) == (0, "", None, ("a.png", "")) and half.original is not None
    (unequal,), _, problem = views(mode="ADDifT", **{"original image": str(one), "target image": str(small)})
    assert "128×64 and 64×64" in problem and unequal.difference is None
    assert unequal.target is not None and unequal.target.size == (64, 64)
    missing = str(tmp_path / "none.png")
    (gone,), _, problem = views(mode="Difference", **{"original image": str(one), "target image": missing})
    assert "none.png" in problem and gone.original is not None and gone.target is None
    assert views(mode="Multi-ADDifT", lora_data_directory=str(tmp_path / "no"), diff_target_name="_b")[0] == []
