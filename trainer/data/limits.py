"""Which pictures are decoded: told by their headers, before there is memory for a single pixel.

A file of a hundred bytes can say that it has a hundred million pixels. What counts is the memory that decoding takes:
so many bytes for each pixel, by colour mode and file format.
"""

from __future__ import annotations

import struct

from PIL import Image

MOST_MEMORY = 400_000_000
"""Bytes that one decoded picture may take on its way to 8-bit RGB: 100 megapixels of a plain JPEG, 30 with alpha."""
LONGEST_SIDE = 32_768
LARGEST_FILE = 256 * 2**20
LARGEST_TILE = 4096
ICON, LARGEST_ICON = b"\0\0\1\0", 4096 * 4096
"""How icon files begin: Pillow decodes them while it opens them. Pixels of a picture inside one."""

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "TIFF", "BMP", "DIB", "WEBP", "PCX", "ICO", "AVIF")
"""Readers that may be asked. Pillow tries all it has, whatever the file is called, and some start other programs."""

_BY_MODE = {"1": 5, "L": 5, "P": 5, "RGB": 4, "CMYK": 8, "YCbCr": 8, "LAB": 8, "HSV": 8, "RGBX": 8}
_OTHER_MODE = 13
_BY_FORMAT = {"WEBP": 12, "AVIF": 16, "ICO": 8}
_PROGRESSIVE = 6


def formats() -> list[str]:
    """The readers of FORMATS that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def refusal(image: Image.Image) -> str:
    """Why an opened picture is not decoded, as a sentence about it; "" when it is."""
    width, height = image.size
    if not width or not height:
        return "it has no pixels"
    most = MOST_MEMORY // _bytes_per_pixel(image)
    if max(width, height) > LONGEST_SIDE:
        return f"{width}×{height} pixels: at most {LONGEST_SIDE} are read on a side. Make it smaller first"
    if width * height > most:
        kind = f"{image.format or 'picture'} in colour mode {image.mode}"
        return (
            f"{width}×{height} pixels are {width * height / 1e6:.0f} megapixels, more than the {most / 1e6:.0f} that"
            f" are read of a {kind}. Make it smaller first"
        )
    tiles = [_number(image, tag) for tag in (322, 323)] if image.format == "TIFF" else []
    if any(side > LARGEST_TILE for side in tiles):
        return f"it is kept in tiles of {tiles[0]}×{tiles[1]} pixels, and at most {LARGEST_TILE} on a side are read"
    return ""


def icon_refusal(data: bytes) -> str:
    """Why the pictures inside an icon file are not decoded; "" when they are. Its own header tells only 1 to 256."""
    count = int.from_bytes(data[4:6], "little")
    for number in range(count):
        entry = data[6 + 16 * number : 22 + 16 * number]
        if len(entry) < 16:
            return "the file is truncated"
        at = int.from_bytes(entry[12:16], "little")
        inside = data[at : at + 24]
        if len(inside) < 24:
            return "the file is truncated"
        png = inside.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", inside[16:24]) if png else struct.unpack("<ii", inside[4:12])
        if abs(width) * abs(height) > LARGEST_ICON:
            return f"an image in it has {width}×{height} pixels; at most {LARGEST_ICON // 10**6} megapixels are read"
    return ""


def _bytes_per_pixel(image: Image.Image) -> int:
    mode = _OTHER_MODE if "transparency" in image.info else _BY_MODE.get(image.mode, _OTHER_MODE)
    progressive = image.format in ("JPEG", "MPO") and "progressive" in image.info
    return mode + _BY_FORMAT.get(image.format or "", _PROGRESSIVE if progressive else 0)


def _number(image: Image.Image, tag: int) -> int:
    found = getattr(image, "tag_v2", {}).get(tag, 0)
    return found if isinstance(found, int) else 0
