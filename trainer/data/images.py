"""Reading pictures: upright, 8-bit RGB, transparency laid on white and kept as a mask, first frame of animations."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from ..errors import DataError
from ..writing import why
from .buckets import Placement, Size
from .limits import ICON, LARGEST_FILE, formats, icon_refusal, refusal

_STRIP = 256
"""Rows that are worked on at once where a picture takes more memory on the way than in the end."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged or hostile files; a MemoryError or a defect of ours is not among them.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class BrokenPicture(DataError):
    """A picture that cannot be opened or decoded; the text is the reason, without the file's name."""


class _Watched(io.BytesIO):
    """Bytes that remember a read beyond their end."""

    past_end = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.past_end = self.past_end or (not data and size != 0)
        return data


def read_size(path: Path) -> Size:
    """Width and height of the upright picture, from its header where the format allows. Raises BrokenPicture."""
    try:
        _check_length(path.stat().st_size)
        with path.open("rb") as file:
            icon = file.read(len(ICON)) == ICON
        if icon:
            _check_icon(picture_bytes(path))
        with Image.open(path, formats=formats()) as image:
            _check(image)
            if image.format == "PNG" and _has_late_metadata(path):
                image.load()
            orientation = _orientation(image)
            if image.format == "TIFF" and orientation >= 5:
                image.load()  # Pillow turns TIFF files itself; older ones tell the turned size only afterwards
                orientation = 1
            width, height = image.size
    except _DECODER_ERRORS as error:
        raise BrokenPicture(_reason(error)) from error
    return (height, width) if orientation >= 5 else (width, height)


def decode(data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """The upright RGB picture in a file's bytes and its transparency (mode L, 0 = transparent), None if fully opaque.

    Raises BrokenPicture.
    """
    with _opened(data) as (image, orientation):
        rgb, mask = _split(image)
    return _turned(rgb, orientation), None if mask is None else _turned(mask, orientation)


def decode_with_alpha(data: bytes) -> Image.Image:
    """The upright picture in a file's bytes as RGBA, or as RGB when it is fully opaque. Raises BrokenPicture."""
    with _opened(data) as (image, orientation):
        rgb, mask = _split(image)
        picture = rgb if mask is None else image if image.mode == "RGBA" else image.convert("RGBA")
    return _turned(picture, orientation)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """The decoded picture in a file's bytes, and how it has to be turned. Raises BrokenPicture, also inside."""
    _check_length(len(data))
    _check_icon(data)
    source = _Watched(data)
    try:
        with Image.open(source, formats=formats()) as image:
            _check(image)
            source.past_end = False
            image.load()
            # Other extensions switch Pillow's tolerance on for the whole process; half a picture is still broken.
            if ImageFile.LOAD_TRUNCATED_IMAGES and source.past_end and image.format in ("JPEG", "PNG"):
                raise BrokenPicture("the file is truncated")
            yield image, _orientation(image) if image.format != "TIFF" else 1  # turned by Pillow
    except _DECODER_ERRORS as error:
        raise BrokenPicture(_reason(error)) from error


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def picture_bytes(path: Path) -> bytes:
    """The bytes of a picture file. Raises BrokenPicture, also for a file too large to be a picture."""
    try:
        with path.open("rb") as file:
            _check_length(os.fstat(file.fileno()).st_size)
            return file.read()
    except (OSError, ValueError) as error:
        raise BrokenPicture(_reason(error)) from error


def strips(path: Path) -> Iterator[torch.Tensor]:
    """A picture in strips from the top, each `rgb_CHW` float32 in [-1, 1]. Raises BrokenPicture."""
    rgb, _ = decode(picture_bytes(path))
    for top in range(0, rgb.height, _STRIP):
        yield _rgb_tensor(rgb.crop((0, top, rgb.width, min(top + _STRIP, rgb.height))))


def fit(rgb: Image.Image, mask: Image.Image | None, placement: Placement) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The part of a decoded picture that fills its bucket: `rgb_CHW` in [-1, 1] and `mask_HW` in [0, 1] or None.

    Lanczos for the picture (averaging when it shrinks), box for the mask. Raises BrokenPicture when the decoded size
    is not the one the placement was made for.
    """
    if rgb.size != placement.size:
        told, found = (f"{width}×{height}" for width, height in (placement.size, rgb.size))
        raise BrokenPicture(f"the header says {told} pixels but the image has {found}")
    # Resizing only the part that stays gives the same pixels as cropping afterwards, also for a 1 × 5000 picture.
    rgb = rgb.resize(placement.bucket, Image.Resampling.LANCZOS, box=placement.box)
    if mask is not None:
        mask = mask.resize(placement.bucket, Image.Resampling.BOX, box=placement.box)
    if placement.flipped:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mask is not None else None
    return _rgb_tensor(rgb), _mask_tensor(mask)


def _rgb_tensor(rgb: Image.Image) -> torch.Tensor:
    pixels_HWC = torch.from_numpy(np.array(rgb, dtype=np.float32))
    return pixels_HWC.div_(127.5).sub_(1).permute(2, 0, 1).contiguous()


def _mask_tensor(mask: Image.Image | None) -> torch.Tensor | None:
    return None if mask is None else torch.from_numpy(np.array(mask, dtype=np.float32)) / 255


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB"), None
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    mask = rgba.getchannel("A")
    rgb = Image.new("RGB", rgba.size)
    for top in range(0, rgba.height, _STRIP):
        strip = rgba.crop((0, top, rgba.width, min(top + _STRIP, rgba.height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    low, _ = mask.getextrema()
    return rgb, None if low == 255 else mask


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits, or of 0 to 1 in floating point, as 8 bits."""
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= white):
        raise BrokenPicture(
            f"its grey levels run from {low:g} to {high:g}; 0 to 1 (floating point) or 0 to 65535 can be read. "
            "Save it as an 8-bit image"
        )
    grey = np.empty(levels.shape, np.uint8)
    for top in range(0, len(levels), _STRIP):
        strip = levels[top : top + _STRIP].astype(np.float64)
        grey[top : top + _STRIP] = np.rint(strip * (255 / white)).astype(np.uint8)
    return Image.fromarray(grey)


def _check_length(length: int) -> None:
    if not length:
        raise BrokenPicture("the file is empty")
    if length > LARGEST_FILE:
        raise BrokenPicture(f"the file is larger than the {LARGEST_FILE // 2**20} MiB that are read")


def _check_icon(data: bytes) -> None:
    why = icon_refusal(data) if data.startswith(ICON) else ""
    if why:
        raise BrokenPicture(why)


def _check(image: Image.Image) -> None:
    why = refusal(image)
    if why:
        raise BrokenPicture(why)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 when there is none or it cannot be read: the pixels are good all the same."""
    try:
        # The PNG reader's own getexif decodes the picture; what stands behind the pixels is looked for by read_size.
        found = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _has_late_metadata(path: Path) -> bool:
    """Whether a PNG file has EXIF or text chunks behind its pixels, where some editors put them."""
    with path.open("rb") as file:
        file.seek(8)
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels_seen = pixels_seen or kind == b"IDAT"
            if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(length + 4, io.SEEK_CUR)
    return False


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a kind that is read, or damaged at its start"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "it has more pixels than are read. Make it smaller first"
    return why(error)
