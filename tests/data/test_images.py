"""Reading real files: orientation, transparency, depth, animation, damage."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_pictures import load_rgb, noise
from PIL import Image, ImageFile, ImageOps

from trainer.data import images
from trainer.data.buckets import place
from trainer.data.images import BrokenPicture, decode, fit, read_size

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def pixel(rgb_CHW: torch.Tensor, x: int, y: int) -> list[int]:
    return ((rgb_CHW[:, y, x] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    path = tmp_path / f"turned.{kind}"
    picture = noise((24, 16)).resize((48, 32), Image.Resampling.NEAREST)
    picture.save(path, exif=exif(orientation), **({"lossless": True} if kind == "webp" else {}))
    picture.save(tmp_path / f"plain.{kind}", **({"lossless": True} if kind == "webp" else {}))
    stored = np.array(Image.open(tmp_path / f"plain.{kind}"))
    expected = {
        1: stored, 2: stored[:, ::-1], 3: np.rot90(stored, 2), 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    rgb_CHW, mask = load_rgb(path)
    assert mask is None
    assert read_size(path) == ((32, 48) if orientation >= 5 else (48, 32))
    assert np.array_equal(((rgb_CHW + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


def test_orientation_by_hand(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((0, 0), RED)
    picture.putpixel((1, 0), BLUE)
    picture.save(
        tmp_path / "a.png", exif=exif(6)
    )  # the camera was held so that a quarter turn clockwise shows it right
    rgb_CHW, _ = load_rgb(tmp_path / "a.png")
    assert tuple(rgb_CHW.shape) == (3, 2, 1)
    assert pixel(rgb_CHW, 0, 0) == list(RED) and pixel(rgb_CHW, 0, 1) == list(BLUE)


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    noise((48, 32)).save(path)
    body = exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = path.read_bytes()
    end = data.rindex(b"IEND") - 4
    path.write_bytes(data[:end] + chunk + data[end:])
    assert read_size(path) == (32, 48)
    assert tuple(load_rgb(path)[0].shape) == (3, 48, 32)


def test_unreadable_exif_does_not_spoil_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise((48, 32)).save(path, exif=b"Exif\0\0nonsense")
    assert read_size(path) == (48, 32)
    assert tuple(load_rgb(path)[0].shape) == (3, 32, 48)


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "gif", "ico"])
def test_transparent_becomes_white_and_mask(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGBA", (32, 32), (0, 0, 255, 255))
    picture.paste((255, 0, 0, 0), (0, 0, 16, 32))
    path = tmp_path / f"a.{kind}"
    options = {"webp": {"lossless": True}, "ico": {"sizes": [(32, 32)]}}.get(kind, {})
    picture.save(path, **options)
    rgb_CHW, mask_HW = load_rgb(path)
    assert mask_HW is not None and tuple(mask_HW.shape) == (32, 32)
    assert pixel(rgb_CHW, 3, 5) == [255, 255, 255] and pixel(rgb_CHW, 20, 5) == list(BLUE)
    assert mask_HW[5, 3] == 0 and mask_HW[5, 20] == 1


def test_half_transparent() -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 51))
    rgb, mask = images._split(picture)
    assert rgb.getpixel((0, 0)) == (204, 204, 204) and mask is not None and mask.getpixel((0, 0)) == 51


def test_opaque_alpha_is_no_mask(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (*GREEN, 255)).save(tmp_path / "a.png")
    rgb_CHW, mask = load_rgb(tmp_path / "a.png")
    assert mask is None and pixel(rgb_CHW, 0, 0) == list(GREEN)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "white").convert("L" if mode == "I;16" else mode).save(path)
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(path)
    rgb_CHW, mask = load_rgb(path)
    assert tuple(rgb_CHW.shape) == (3, 8, 8) and mask is None
    assert torch.equal(rgb_CHW, torch.ones(3, 8, 8))


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 1), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    rgb_CHW, mask_HW = load_rgb(tmp_path / "a.png")
    assert mask_HW is not None and mask_HW.sum() == 1 and mask_HW[1, 1] == 1
    assert pixel(rgb_CHW, 1, 1) == list(GREEN) and pixel(rgb_CHW, 0, 0) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, kind: str) -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{kind}")
    rgb_CHW, _ = load_rgb(tmp_path / f"a.{kind}")
    assert [pixel(rgb_CHW, x, y) for y in (0, 1) for x in (0, 1)] == [[0] * 3, [100] * 3, [200] * 3, [255] * 3]


def test_sixteen_bits_turned(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.png", exif=exif(6))
    assert read_size(tmp_path / "a.png") == (1, 2)
    assert load_rgb(tmp_path / "a.png")[0][0, :, 0].tolist() == [-1, 1]


def test_floating_point_tiff(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1]], np.float32)).save(tmp_path / "a.tif")
    assert load_rgb(tmp_path / "a.tif")[0][0].tolist() == [[-1, 1]]
    Image.fromarray(np.array([[0, 900]], np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(BrokenPicture, match="grey levels run from 0 to 900"):
        load_rgb(tmp_path / "b.tif")


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, kind: str) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"a.{kind}")
    rgb_CHW, mask = load_rgb(tmp_path / f"a.{kind}")
    assert mask is None
    assert np.allclose(pixel(rgb_CHW, 8, 8), RED, atol=3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert Image.open(tmp_path / f"a.{kind}").n_frames == 3
    rgb_CHW, _ = load_rgb(tmp_path / f"a.{kind}")
    assert pixel(rgb_CHW, 4, 4) == list(RED)


@pytest.mark.parametrize("kind", ["bmp", "pcx"])
def test_other_types(tmp_path: Path, kind: str) -> None:
    picture = noise((20, 10))
    picture.save(tmp_path / f"a.{kind}")
    assert read_size(tmp_path / f"a.{kind}") == (20, 10)
    rgb_CHW, _ = load_rgb(tmp_path / f"a.{kind}")
    assert pixel(rgb_CHW, 7, 3) == list(picture.getpixel((7, 3)))


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tolerant: bool) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some extensions of the WebUIs do
    path = tmp_path / f"a.{kind}"
    noise((128, 128)).save(path)
    load_rgb(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenPicture, match="truncated"):
        load_rgb(path)


@pytest.mark.parametrize("kind", ["webp", "bmp", "tif", "gif"])
def test_truncated_others(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    noise((128, 128)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenPicture):
        load_rgb(path)


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_not_a_picture(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for read in (read_size, load_rgb):
        with pytest.raises(BrokenPicture) as caught:
            read(path)
        assert str(tmp_path) not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    for read in (read_size, load_rgb):
        with pytest.raises(BrokenPicture, match="there is no such file"):
            read(tmp_path / "gone.png")


def header_only(width: int, height: int, mode: int = 2) -> bytes:
    """A PNG file of some hundred bytes that says how many pixels it has, and holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(50))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "mode", "why"), [
    ((1, 178_956_970), 2, "at most 32768 are read on a side"), ((178_956_970, 1), 2, "on a side"),
    ((13_377, 13_377), 2, "179 megapixels, more than the 100"), ((9_000, 9_000), 6, "81 megapixels, more than the 31"),
])  # fmt: skip
def test_more_pixels_than_there_is_memory_for(tmp_path: Path, size: tuple[int, int], mode: int, why: str) -> None:
    """Refused by the header: nothing of that size is ever allocated."""
    (tmp_path / "a.png").write_bytes(header_only(*size, mode))
    tracemalloc.start()
    for read in (read_size, load_rgb):
        with pytest.raises(BrokenPicture, match=why):
            read(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_an_icon_is_judged_by_the_picture_inside() -> None:
    inside = header_only(9_000, 9_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    with pytest.raises(BrokenPicture, match="9000×9000"):
        decode(struct.pack("<HHH", 0, 1, 1) + entry + inside)


def test_a_program_is_never_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file's name says."""
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for read in (read_size, load_rgb):
        with pytest.raises(BrokenPicture, match="not an image of a kind that is read"):
            read(tmp_path / "a.png")


def test_strips_are_the_picture(tmp_path: Path) -> None:
    noise((7, 600), 3).save(tmp_path / "a.png")
    assert torch.equal(torch.cat(list(images.strips(tmp_path / "a.png")), 1), load_rgb(tmp_path / "a.png")[0])


def test_files_are_closed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "a.gif"
    noise((16, 16)).save(path, save_all=True, append_images=[noise((16, 16), 1)])
    read_size(path)
    load_rgb(path)
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("size", "bucket"), [((300, 200), (64, 64)), ((37, 91), (128, 256)), ((64, 64), (64, 64)), ((201, 99), (96, 48))]
)
def test_fit_is_resize_then_crop(size: tuple[int, int], bucket: tuple[int, int], flipped: bool) -> None:
    picture, mask = noise(size), noise(size, 1, "L")
    placed = place(size, bucket, flipped)
    rgb_CHW, mask_HW = fit(picture, mask, placed)
    expected = picture.resize(placed.resized, Image.Resampling.LANCZOS)
    if flipped:
        expected = ImageOps.mirror(expected)
    top, left = placed.crop
    expected = expected.crop((left, top, left + bucket[0], top + bucket[1]))
    difference = ((rgb_CHW + 1) * 127.5).permute(1, 2, 0).numpy() - np.array(expected, np.float32)
    assert rgb_CHW.shape == (3, bucket[1], bucket[0]) and np.abs(difference).max() <= 1.01
    assert mask_HW is not None and mask_HW.shape == (bucket[1], bucket[0]) and 0 <= mask_HW.min() <= mask_HW.max() <= 1


def test_fit_of_a_line() -> None:
    rgb_CHW, _ = fit(Image.new("RGB", (1, 5000), RED), None, place((1, 5000), (512, 512)))
    assert rgb_CHW.shape == (3, 512, 512) and pixel(rgb_CHW, 0, 511) == list(RED)


def test_fit_refuses_another_size() -> None:
    with pytest.raises(BrokenPicture, match="header says 64×64 pixels but the image has 32×64"):
        fit(noise((32, 64)), None, place((64, 64), (64, 64)))


def test_decode_of_nothing() -> None:
    with pytest.raises(BrokenPicture, match="empty"):
        decode(b"")
