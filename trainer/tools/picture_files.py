"""What the picture tools share: finding pictures, reading them upright, writing them where nothing is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..data.images import BrokenPicture, decode_with_alpha, picture_bytes
from ..data.leftover import PICTURE_TYPES
from ..errors import DataError
from ..paths import is_dir, is_file
from ..writing import why

OPAQUE_ONLY = frozenset({".jpg", ".jpeg", ".jfif", ".bmp", ".pcx"})
SAVE_OPTIONS: dict[str, dict[str, object]] = {
    **{kind: {"quality": 95, "subsampling": 0} for kind in (".jpg", ".jpeg", ".jfif")}, ".webp": {"quality": 95},
}  # fmt: skip


def pictures_of(source: Path) -> list[Path]:
    """The picture files directly in a folder, by name, or the one picture `source` is. Raises DataError for none."""
    if is_file(source):
        if source.suffix.lower() in PICTURE_TYPES:
            return [source]
        raise DataError(f"{source.name} is no image file. Known endings: {' '.join(PICTURE_TYPES)}.")
    if not is_dir(source):
        raise DataError(f"{str(source)!r} is neither a folder nor an image. Check the spelling.")
    found = sorted(
        path for path in source.iterdir()
        if path.is_file() and path.suffix.lower() in PICTURE_TYPES and not path.name.startswith(".")
    )  # fmt: skip
    if not found:
        raise DataError(f"There is no image in {str(source)!r}. Looked for {' '.join(PICTURE_TYPES)}.")
    return found


def read_picture(path: Path) -> Image.Image:
    """The upright picture as RGB, or RGBA when it has transparent parts. Raises DataError naming the file."""
    try:
        return decode_with_alpha(picture_bytes(path))
    except BrokenPicture as error:
        raise DataError(f"{path.name} cannot be read: {error}.") from error


def check_picture(name: str, content: bytes) -> None:
    """Raises DataError when the bytes are no whole picture, or the name has no ending of one."""
    if Path(name).suffix.lower() not in PICTURE_TYPES:
        raise DataError(f"{name} is no image file. Known endings: {' '.join(PICTURE_TYPES)}.")
    try:
        decode_with_alpha(content)
    except BrokenPicture as error:
        raise DataError(f"{name} cannot be read: {error}.") from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write the picture in the format of the ending; transparency is laid on white where the format has none.

    Raises DataError when there is such a file already or it cannot be written.
    """
    suffix = path.suffix.lower()
    if picture.mode == "RGBA" and suffix in OPAQUE_ONLY:
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture).convert("RGB")
    try:
        with path.open("xb") as file:
            picture.save(file, format=Image.registered_extensions()[suffix], **SAVE_OPTIONS.get(suffix, {}))
    except FileExistsError as error:
        raise DataError(f"{path.name} is there already. Choose another name for the new folder.") from error
    except (OSError, ValueError, KeyError) as error:
        path.unlink(missing_ok=True)
        raise DataError(f"{path.name} cannot be written: {why(error)}.") from error


def companions(picture: Path) -> Iterator[Path]:
    """The files that belong to a picture: same name, another ending (caption, mask); no hidden ones."""
    for path in sorted(picture.parent.iterdir()):
        if path.stem == picture.stem and path.suffix != picture.suffix and path.is_file():
            yield path


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a name that is free. Raises DataError."""
    if target.exists():
        raise DataError(f"{target.name} is there already. Choose another name for the new folder.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(f"{target.name} cannot be written: {why(error)}.") from error
