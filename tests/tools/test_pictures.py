"""Picture tools: sizes worked out by hand, pixels compared with plain arithmetic, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_pictures import noise
from PIL import Image

from trainer.errors import DataError, JobError
from trainer.tools.augment_pictures import AugmentSettings, augment_pictures, augmented, parse_augment, previews
from trainer.tools.picture_files import read_picture, save_picture
from trainer.tools.resize_pictures import (
    ResizeSettings,
    cut_size,
    parse_resize,
    resize_pictures,
    resized,
    shrunk_size,
)

RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)


def test_sizes_by_hand() -> None:
    assert shrunk_size((1024, 512), (512, 512)) == (724, 362)  # √(262144 / 524288) = 0.7071…
    assert shrunk_size((512, 512), (512, 512)) == (512, 512)
    assert shrunk_size((300, 200), (512, 512)) == (300, 200), "never enlarged"
    assert shrunk_size((9000, 1), (64, 64)) == (6071, 1), "no side becomes nothing"
    assert cut_size((724, 362), 8) == (720, 360) and cut_size((724, 362), 64) == (704, 320)
    assert cut_size((6, 100), 8) == (6, 96)


def test_area_is_the_mean_of_the_pixels_it_covers() -> None:
    picture = noise((64, 32))
    small = np.asarray(resized(picture, (16, 8), ResizeSettings(((16, 8),), 1)), dtype=float)
    pixels = np.asarray(picture, dtype=float)
    means = pixels.reshape(8, 4, 16, 4, 3).mean((1, 3))
    assert small.shape == (8, 16, 3) and np.abs(small - means).max() <= 1, "rounded twice"


def test_each_size_is_made_from_the_original_and_keeps_its_middle(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture = noise((100, 60))
    picture.save(source / "cat.png")
    (source / "cat.txt").write_text("a cat")
    (source / "dog.txt").write_text("no image of this name")
    order = parse_resize("32x32, 64X64,1000x1000")
    written = resize_pictures(source, target, order)
    assert [path.name for path in written] == ["cat+32x32.png", "cat+64x64.png", "cat+1000x1000.png"]
    sizes = {path.name: Image.open(path).size for path in written}
    # √(1024/6000)·(100, 60) = (41.3, 24.8) → (41, 24) → (40, 24); (82.6, 49.5) → (80, 48); (100, 60) → (96, 56)
    assert list(sizes.values()) == [(40, 24), (80, 48), (96, 56)]
    alone = resized(picture, (64, 64), order)
    assert np.array_equal(np.asarray(Image.open(target / "cat+64x64.png")), np.asarray(alone))
    middle = np.asarray(picture)[2:58, 2:98]
    assert np.array_equal(np.asarray(Image.open(target / "cat+1000x1000.png")), middle)
    assert sorted(path.name for path in target.glob("*.txt")) == [
        "cat+1000x1000.txt", "cat+32x32.txt", "cat+64x64.txt",
    ]  # fmt: skip
    with pytest.raises(DataError, match="is there already"):
        resize_pictures(source, target, order)


def test_transparency_and_formats(tmp_path: Path) -> None:
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    half.paste((200, 10, 10, 255), (0, 0, 8, 16))
    half.save(tmp_path / "half.png")
    small = resized(read_picture(tmp_path / "half.png"), (8, 8), ResizeSettings(((8, 8),), 1))
    assert small.getpixel((0, 4)) == (200, 10, 10, 255) and small.getpixel((7, 4))[3] == 0
    save_picture(small, tmp_path / "half.jpg")
    flat = Image.open(tmp_path / "half.jpg")
    assert flat.mode == "RGB" and min(flat.getpixel((7, 4))) > 240, "white where it was transparent"
    with pytest.raises(DataError, match=r"half\.jpg is there already"):
        save_picture(small, tmp_path / "half.jpg")


def test_settings_are_refused_with_all_their_problems() -> None:
    with pytest.raises(JobError) as caught:
        parse_resize("512,12x0,8x8,8x8", divisible="0", interpolation="nearest")
    assert [problem.field for problem in caught.value.problems] == [
        "resolutions", "resolutions", "resolutions", "divisible", "interpolation",
    ]  # fmt: skip
    with pytest.raises(JobError) as caught:
        parse_augment({"copies": "0", "angle": "200", "scale": "2", "seed": "x"}, side="middle")
    assert [problem.field for problem in caught.value.problems] == ["copies", "angle", "scale", "seed", "side"]
    with pytest.raises(JobError, match="all copies would be the same"):
        parse_augment({"angle": "0", "scale": "1"})
    assert parse_augment({"copies": "", "angle": "7.5"}) == AugmentSettings(angle=7.5)


def test_a_turned_copy_holds_all_of_the_picture() -> None:
    picture = Image.new("RGB", (40, 20), RED[:3])
    copy = augmented(picture, "cat", 0, AugmentSettings(angle=90, scale=1))
    alpha = np.asarray(copy)[..., 3] / 255
    assert alpha.sum() == pytest.approx(800, rel=0.02), "turning keeps the area"
    assert copy.width > 20 and copy.height > 20 and (alpha[0, 0] == 0 or copy.size == (40, 20))
    opaque = np.asarray(copy)[np.asarray(copy)[..., 3] > 128]
    assert (opaque[:, 0] > 250).all() and (opaque[:, 1:3] < 5).all(), "no dark edge"


def test_a_shrunk_copy_stays_at_its_side() -> None:
    picture = Image.new("RGB", (60, 40), BLUE[:3])
    for side, edge in {"left": (slice(None), 0), "right": (slice(None), -1), "top": 0, "bottom": -1}.items():
        seen = set()
        for number in range(6):
            copy = augmented(picture, "cat", number, AugmentSettings(angle=0, scale=0.4, side=side))
            assert copy.size == (60, 40) and copy.mode == "RGBA"
            alpha = np.asarray(copy)[..., 3]
            assert (alpha[edge] == 255).any(), side
            rows, columns = np.where(alpha == 255)
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert 0.38 <= width / 60 <= 1 and abs(width / 60 - height / 40) < 0.03
            seen.add(int(width))
        assert len(seen) > 2, "the scale is drawn for each copy"


def test_copies_belong_to_their_picture_not_to_their_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise((20, 20)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    settings = AugmentSettings(copies=3, angle=20, scale=0.5, seed=4)
    written = augment_pictures(tmp_path, tmp_path / "out", settings)
    assert [path.name for path in written] == [f"{name}_id_{number}.png" for name in "ab" for number in range(3)]
    assert (tmp_path / "out" / "b_id_2.txt").read_text() == "b"
    alone = augment_pictures(tmp_path / "b.png", tmp_path / "alone", settings)
    assert alone[1].read_bytes() == (tmp_path / "out" / "b_id_1.png").read_bytes()
    shown = list(previews(tmp_path, settings, 4))
    assert [name for name, _ in shown] == ["a_id_0.png", "a_id_1.png", "a_id_2.png"]
    assert np.array_equal(np.asarray(shown[1][1]), np.asarray(Image.open(tmp_path / "out" / "a_id_1.png")))
    other = AugmentSettings(copies=3, angle=20, scale=0.5, seed=5)
    assert augmented(noise((20, 20)), "a", 0, other).tobytes() != augmented(noise((20, 20)), "a", 0, settings).tobytes()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for source, words in (("empty", "no image in"), ("gone", "neither a folder"), ("words.txt", "no image file")):
        with pytest.raises(DataError, match=words):
            augment_pictures(tmp_path / source, tmp_path / "out", AugmentSettings())
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        augment_pictures(tmp_path / "broken.png", tmp_path / "out", AugmentSettings())
