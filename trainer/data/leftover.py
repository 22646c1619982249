"""Files of a data folder that are no part of the training, and why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePath

from PIL import features

_AVIF = (".avif",) if features.check("avif") else ()  # Pillow has it since 11.3, where it was built with it
PICTURE_TYPES = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".bmp", ".webp", ".pcx", ".ico", ".jfif", *_AVIF)
CAPTION_TYPES = (".txt", ".caption")
_LISTED = 20
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")
_OTHER_PICTURES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".dds", ".exr", ".hdr", ".raw"),
    *(".cr2", ".nef", ".arw", ".dng", ".apng", ".jpe"),
)
_KINDS = {
    **dict.fromkeys(_OTHER_PICTURES, "an image type that is not read here; convert it to PNG or JPEG"),
    **dict.fromkeys((".npz", ".safetensors", ".pt"), "latents or weights of another program"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".avi", ".mkv"), "a video; give single images"),
    **dict.fromkeys((".zip", ".rar", ".7z", ".tar", ".gz"), "an archive; unpack it"),
}


def reasons(others: Iterable[str], pictures: Collection[str], by_name: bool) -> Iterator[tuple[str, str]]:
    """(name below the folder, why it is left out) of every file that is neither a picture nor the caption of one.

    `pictures`: the names of the pictures. `by_name`: captions come from file names, so that no caption file is read.
    """
    stems = {str(PurePath(name).with_suffix("")): name for name in pictures}
    for name in others:
        path = PurePath(name)
        if path.name.startswith(".") or path.name.lower() in _OF_THE_SYSTEM:
            continue
        if path.suffix.lower() not in CAPTION_TYPES:
            yield name, _KINDS.get(path.suffix.lower(), "not an image")
        elif (stem := str(path.with_suffix(""))) in pictures:
            own = PurePath(stem).with_suffix(path.suffix).name
            yield name, f"the caption of {PurePath(stem).name} is looked for as {own}; rename it"
        elif stem not in stems:
            yield name, "a caption without an image of its name"
        elif by_name:
            yield name, "image_use_filename_as_tag takes captions from file names"
        else:
            yield name, f"another file holds the caption of {PurePath(stems[stem]).name}"


def by_reason(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for a report: how many for each reason, and which."""
    found: dict[str, list[str]] = {}
    for name, reason in left_out:
        found.setdefault(reason, []).append(name)
    return [
        f"{len(names)} ({reason}): {', '.join(names[:_LISTED])}"
        + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for reason, names in found.items()
    ]
