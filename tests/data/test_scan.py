"""What is found in a folder: order, captions, trigger word, repeats, broken files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from data_pictures import noise, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import features

from trainer.data.images import decode
from trainer.data.scan import scan, tags_of_name, with_trigger
from trainer.data.settings import ImageSettings
from trainer.errors import DataError, JobError


def captions(folder: Path, **values: object) -> dict[str, str]:
    found = scan(ImageSettings(folder=folder, **values))  # type: ignore[arg-type]
    return {picture.name: picture.caption for picture in found.pictures}


def names(folder: Path, **values: object) -> list[str]:
    return list(captions(folder, **values))


def test_recursive_sorted_case_insensitive_no_hidden(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/er/c.WebP", "deep/b.Jpeg", ".hidden.png", ".git/x.png", "猫 été.png"):
        write(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "Thumbs.db").write_bytes(b"no image")
    assert names(tmp_path) == ["a.jpg", "b.PNG", "deep/b.Jpeg", "deep/er/c.WebP", "猫 été.png"]


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "gif", "tif", "tiff", "bmp", "webp", "pcx", "ico"])
def test_every_type_is_found(tmp_path: Path, kind: str) -> None:
    noise((32, 32)).save(tmp_path / f"a.{kind}")
    found = scan(ImageSettings(folder=tmp_path))
    assert [(picture.name, picture.size) for picture in found.pictures] == [(f"a.{kind}", (32, 32))]


def test_txt_before_caption(tmp_path: Path) -> None:
    for name in ("both", "only", "none"):
        write(tmp_path / f"{name}.png")
    (tmp_path / "both.txt").write_text("from txt")
    (tmp_path / "both.caption").write_text("from caption")
    (tmp_path / "only.CAPTION").write_text("from caption")
    assert captions(tmp_path) == {"both.png": "from txt", "none.png": "", "only.png": "from caption"}
    summary = scan(ImageSettings(folder=tmp_path)).summary()
    assert (summary["pictures"], summary["captions found"], summary["captions missing"]) == (3, 2, 1)


@pytest.mark.parametrize(
    "data",
    ["ein Käse, 猫".encode(), "\ufeffein Käse, 猫".encode(), "ein Käse,\r\n猫\r\n".encode(),
     "\ufeffein Käse, 猫".encode("utf-16-le"),
     "\ufeffein Käse,\r\n猫".encode("utf-16-be")],
)  # fmt: skip
def test_caption_encodings(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "a.png").with_suffix(".txt").write_bytes(data)
    assert captions(tmp_path) == {"a.png": "ein Käse, 猫"}


def test_undecodable_captions_are_all_named(tmp_path: Path) -> None:
    for name in ("one", "sub/two"):
        write(tmp_path / f"{name}.png").with_suffix(".txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"2 caption files .*one\.txt \(not in UTF-8\); sub/two\.txt .*Save them as UTF-8"
    ):
        scan(ImageSettings(folder=tmp_path, skip_broken=True))


def test_trigger_word(tmp_path: Path) -> None:
    write(tmp_path / "a.png", caption="a red circle")
    write(tmp_path / "b.png")
    write(tmp_path / "c.png", caption="  \n")
    assert captions(tmp_path, trigger="shs") == {"a.png": "shs, a red circle", "b.png": "shs", "c.png": "shs"}
    assert captions(tmp_path, trigger="  ")["a.png"] == "a red circle"


def test_file_name_as_tags(tmp_path: Path) -> None:
    write(tmp_path / "red_circle_id_07.png", caption="not used")
    write(tmp_path / "blue ring.png")
    assert captions(tmp_path, filename_as_tag=True, trigger="shs") == {
        "blue ring.png": "shs, blue ring",
        "red_circle_id_07.png": "shs, red,circle",
    }
    assert scan(ImageSettings(folder=tmp_path, filename_as_tag=True)).summary()["captions missing"] == 0


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_tag_rules_hold_for_any_text(text: str) -> None:
    assert "_" not in tags_of_name(text)
    assert with_trigger("", text) == text
    assert with_trigger("shs", text).startswith("shs")


def test_repeats_when_every_folder_has_them(tmp_path: Path) -> None:
    write(tmp_path / "10_cat" / "a.png")
    write(tmp_path / "10_cat" / "more" / "b.png")
    write(tmp_path / "2_dog" / "a.png")
    write(tmp_path / "loose.png")
    (tmp_path / "empty").mkdir()
    found = scan(ImageSettings(folder=tmp_path))
    assert {picture.name: (picture.repeats, picture.folder) for picture in found.pictures} == {
        "10_cat/a.png": (10, "10_cat"),
        "10_cat/more/b.png": (10, "10_cat"),
        "2_dog/a.png": (2, "2_dog"),
        "loose.png": (1, tmp_path.name),
    }
    assert found.summary()["repeats"] == "by folder name: 10_cat × 10, 2_dog × 2, outside these folders × 1 (1)"


def test_no_repeats_when_one_folder_lacks_them(tmp_path: Path) -> None:
    for folder in ("10_cat", "2_dog", "others"):
        write(tmp_path / folder / "a.png")
    found = scan(ImageSettings(folder=tmp_path))
    assert [picture.repeats for picture in found.pictures] == [1, 1, 1]
    assert found.repeats_rule == "each image counts once (not named like 10_name: 'others')"


def test_zero_repeats_leave_a_folder_out(tmp_path: Path) -> None:
    write(tmp_path / "0_rest" / "a.png")
    with pytest.raises(DataError, match="zero times"):
        scan(ImageSettings(folder=tmp_path))
    write(tmp_path / "3_cat" / "a.png")
    found = scan(ImageSettings(folder=tmp_path))
    assert [picture.name for picture in found.pictures] == ["3_cat/a.png"]
    assert "0_rest × 0 (left out)" in found.repeats_rule


def test_own_name_of_the_folder_is_no_repeat(tmp_path: Path) -> None:
    write(tmp_path / "5_cat" / "a.png")
    found = scan(ImageSettings(folder=tmp_path / "5_cat"))
    assert found.pictures[0].repeats == 1 and found.pictures[0].folder == "5_cat"
    assert "give the folder above it" in found.repeats_rule


def test_missing_empty_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist. Give the folder"):
        scan(ImageSettings(folder=tmp_path / "gone"))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        scan(ImageSettings(folder=tmp_path / "file.txt"))
    with pytest.raises(DataError, match=r"no image in it or its sub-folders. Looked for jpg jpeg png"):
        scan(ImageSettings(folder=tmp_path))
    with pytest.raises(JobError):
        scan(ImageSettings(folder=tmp_path, multiply=0))
    with pytest.raises(JobError, match="lora_data_directory"):
        scan(ImageSettings(folder=Path("")))


def test_broken_files_stop_the_run_by_name(tmp_path: Path) -> None:
    write(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.jpg").write_text("<html>")
    with pytest.raises(DataError) as caught:
        scan(ImageSettings(folder=tmp_path))
    assert str(caught.value) == (
        "2 of 3 images cannot be read: empty.png (the file is empty); "
        "sub/page.jpg (not an image of a kind that is read, or damaged at its start). "
        "Repair or remove them, or switch data_skip_broken on to train without them."
    )


def test_broken_files_may_be_skipped_but_not_all(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="No other image is left"):
        scan(ImageSettings(folder=tmp_path, skip_broken=True))
    write(tmp_path / "good.png")
    found = scan(ImageSettings(folder=tmp_path, skip_broken=True))
    assert [picture.name for picture in found.pictures] == ["good.png"]
    assert found.summary()["broken files"] == ["empty.png (the file is empty)"]


def test_many_broken_files_are_all_listed(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.png").touch()
    with pytest.raises(DataError) as caught:
        scan(ImageSettings(folder=tmp_path))
    assert all(f"\n{number:02}.png" in str(caught.value) for number in range(25))


def test_summary_has_no_path(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    assert str(tmp_path) not in str(scan(ImageSettings(folder=tmp_path, skip_broken=True)).summary())


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.png")
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(tmp_path / "elsewhere", data / "linked")
    os.symlink(data, tmp_path / "elsewhere" / "back")
    assert names(data) == ["linked/a.png"]


def test_every_file_that_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    for name in ("cat.png", "dog.jpg", "web.jfif", "deep/owl.png"):
        noise((32, 32)).save(tmp_path / name, format="JPEG") if "j" in name else write(tmp_path / name)
    texts = ("cat.png.txt", "dog.txt", "dog.caption", "lost.txt", "deep/owl.TXT", "notes.md", ".hidden.txt",
             "Thumbs.db", "film.mp4", "phone.heic", "cat.npz", "deep/cat.txt")  # fmt: skip
    for name in texts:
        (tmp_path / name).write_text("words", encoding="utf-8")
    found = scan(ImageSettings(folder=tmp_path))
    assert [picture.name for picture in found.pictures] == ["cat.png", "deep/owl.png", "dog.jpg", "web.jfif"]
    assert [picture.captioned for picture in found.pictures] == [False, True, True, False]
    told = {name.strip(): line for line in found.left_out for name in line.rpartition(": ")[2].split(",")}
    assert set(told) == {*texts} - {"dog.txt", "deep/owl.TXT", ".hidden.txt", "Thumbs.db"}
    assert "caption of cat.png is looked for as cat.txt" in told["cat.png.txt"]
    assert "another file holds the caption of dog.jpg" in told["dog.caption"]
    assert "without an image" in told["lost.txt"] == told["deep/cat.txt"] and "video" in told["film.mp4"]
    assert "convert it" in told["phone.heic"] and "not an image" in told["notes.md"]
    assert found.summary()["left out"] == list(found.left_out)
    by_name = scan(ImageSettings(folder=tmp_path, filename_as_tag=True))
    assert any("image_use_filename_as_tag" in line and "dog.txt" in line for line in by_name.left_out)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".png", ".jpg", ".jfif"):
            path.unlink()
    with pytest.raises(DataError, match="no image in it.*1 .an image type that is not read here"):
        scan(ImageSettings(folder=tmp_path))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    noise((48, 32)).save(tmp_path / "a.avif")
    (picture,) = scan(ImageSettings(folder=tmp_path)).pictures
    rgb, mask = decode(picture.path.read_bytes())
    assert picture.size == rgb.size == (48, 32) and mask is None
