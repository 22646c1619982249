"""Buckets against the worked example of the parameter reference, and placements against hand-computed numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.data.buckets import full_buckets, nearest, place, placements, shrink_buckets, would_enlarge
from trainer.data.settings import ImageSettings
from trainer.errors import JobError


def made(**values: object) -> ImageSettings:
    return ImageSettings(folder=Path("unused"), **values)  # type: ignore[arg-type]


EXAMPLE = made(size=(768, 512), buckets_step=128, min_length=384)
WIDER = made(size=(768, 512), buckets_step=128, min_length=256, sub_images=3, mirroring=True)
FULL = {(384, 768), (512, 768), (512, 640), (512, 512), (640, 512), (768, 512), (768, 384)}
SHRINK = {
    (256, 512), (384, 640), (256, 384), (384, 512), (384, 384), (256, 256), (512, 384), (384, 256), (640, 384),
    (512, 256),
}  # fmt: skip


def test_worked_example() -> None:
    assert set(full_buckets(EXAMPLE)) == FULL
    assert set(full_buckets(WIDER)) == FULL
    assert set(shrink_buckets(WIDER)) == SHRINK
    assert len(full_buckets(WIDER)) == 7 and len(shrink_buckets(WIDER)) == 10


def traintrains_buckets(first: int, second: int, step: int, least: int, most: float) -> tuple[set, set]:
    """Full and smaller buckets by what TrainTrain's make_buckets does, written down again from its source (7b58929)."""
    short, long = sorted((first, second))
    pixels, full, smaller = short * long, {(short, short)}, set()
    width = least
    while width <= long:
        tall = pixels // width
        height = min(long, tall - tall % step)
        if height and 1 / most <= width / height <= most:  # where it is 0, TrainTrain ends with an error
            full |= {(width, height), (height, width)}
        width += step
    for width in range(least, long + 1, step):
        for height in range(least, long + 1, step):
            if width * height <= pixels and 1 / most <= width / height <= most:
                smaller |= {pair for pair in ((width, height), (height, width)) if pair not in full}
    return full, smaller


SIDES = st.integers(4, 160).map(lambda side: side * 8)


@hypothesis_settings(max_examples=600, deadline=None)
@given(SIDES, SIDES, st.integers(1, 80).map(lambda step: step * 8), SIDES, st.sampled_from([1, 1.1, 1.5, 2, 3, 16]))
def test_buckets_are_traintrains(first: int, second: int, step: int, least: int, most: float) -> None:
    full, smaller = traintrains_buckets(first, second, step, least, most)
    chosen = made(size=(first, second), buckets_step=step, min_length=least, max_ratio=float(most))
    assert set(full_buckets(chosen)) == full and set(shrink_buckets(chosen)) == smaller
    for buckets in (full_buckets(chosen), shrink_buckets(chosen)):
        ratios = [width / height for width, height in buckets]
        assert ratios == sorted(ratios) and len(set(buckets)) == len(buckets)


def test_a_long_side_off_the_grid_is_kept() -> None:
    """The height is rounded down to the step before it is cut to the long side: 600, not 512."""
    assert (256, 600) in full_buckets(made(size=(600, 600), buckets_step=256, min_length=256, max_ratio=3.0))


def test_order_of_size_does_not_matter() -> None:
    assert full_buckets(made(size=(512, 768), buckets_step=128, min_length=384)) == full_buckets(EXAMPLE)


def test_defaults_are_one_square() -> None:
    assert full_buckets(made()) == ((512, 512),)
    assert full_buckets(made(size=(64, 64), buckets_step=64)) == ((64, 64),)
    assert shrink_buckets(made()) == ()


def test_1024_with_defaults() -> None:
    assert set(full_buckets(made(size=(1024, 1024)))) == {
        (512, 1024),
        (768, 1024),
        (1024, 1024),
        (1024, 768),
        (1024, 512),
    }


def test_one_picture_gives_eight() -> None:
    placed = placements((1000, 1000), WIDER, full_buckets(WIDER), shrink_buckets(WIDER))
    assert len(placed) == 8
    assert [p.bucket for p in placed[::2]] == [(512, 512), (384, 384), (256, 256), (384, 512)]
    assert [p.flipped for p in placed] == [False, True] * 4


def test_fewer_shrink_buckets_than_asked() -> None:
    assert len(nearest((3, 2), shrink_buckets(WIDER), 99)) == 10


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 768), (512, 768)),
        ((300, 900), (384, 768)),
        ((4000, 1000), (768, 384)),
        ((1030, 1000), (512, 512)),
        ((1200, 1000), (640, 512)),
    ],
)
def test_nearest_aspect_ratio(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest(size, full_buckets(EXAMPLE)) == (bucket,)


def test_disable_upscale_drops_what_would_grow() -> None:
    strict = made(size=(768, 512), buckets_step=128, min_length=256, sub_images=3, disable_upscale=True)
    placed = placements((400, 400), strict, full_buckets(strict), shrink_buckets(strict))
    assert [p.bucket for p in placed] == [(384, 384), (256, 256)]
    assert placements((255, 900), strict, full_buckets(strict), shrink_buckets(strict)) == ()
    assert not would_enlarge((512, 512), (512, 512)) and would_enlarge((511, 600), (512, 512))


def test_placement_by_hand() -> None:
    placed = place((1000, 600), (512, 512))
    # 512/600 is the larger scale: 1000 · 512/600 = 853.3; (853 - 512) // 2 = 170
    assert placed.resized == (853, 512) and placed.crop == (0, 170)
    assert placed.box == pytest.approx((170 * 1000 / 853, 0, 682 * 1000 / 853, 600))
    mirrored = place((1000, 600), (512, 512), flipped=True)
    assert mirrored.crop == (0, 853 - 512 - 170)  # one pixel further, counted from the other side
    assert mirrored.box == placed.box  # the same part of the picture


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(st.integers(1, 128), st.integers(1, 128)),
    st.booleans(),
)
def test_placement_covers_bucket(size: tuple[int, int], eighths: tuple[int, int], flipped: bool) -> None:
    bucket = (eighths[0] * 8, eighths[1] * 8)
    placed = place(size, bucket, flipped)
    assert placed.resized[0] >= bucket[0] and placed.resized[1] >= bucket[1]
    assert placed.resized[0] == bucket[0] or placed.resized[1] == bucket[1]
    left, top, right, bottom = placed.box
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(8, 128), st.integers(8, 128)),
    st.sampled_from([8, 32, 64, 128, 256]),
    st.integers(4, 80),
    st.floats(1, 4),
)
def test_bucket_invariants(eighths: tuple[int, int], step: int, low: int, ratio: float) -> None:
    chosen = made(size=(eighths[0] * 8, eighths[1] * 8), buckets_step=step, min_length=low * 8, max_ratio=ratio)
    full, shrink = full_buckets(chosen), shrink_buckets(chosen)
    short, long = sorted(chosen.size)
    assert (short, short) in full and not set(full) & set(shrink)
    assert {(h, w) for w, h in full} == set(full) and {(h, w) for w, h in shrink} == set(shrink)
    for width, height in full + shrink:
        assert width * height <= short * long and max(width, height) <= long
        assert max(width, height) <= ratio * min(width, height)
        assert width % 8 == height % 8 == 0


def test_all_problems_at_once() -> None:
    with pytest.raises(JobError) as caught:
        full_buckets(made(size=(500, 512), buckets_step=0, min_length=100, max_ratio=0.5, sub_images=-1, multiply=0))
    assert [problem.field for problem in caught.value.problems] == [
        "image_size(height, width)", "image_buckets_step", "image_min_length", "image_max_ratio", "sub_image_num",
        "image_num_multiply",
    ]  # fmt: skip
