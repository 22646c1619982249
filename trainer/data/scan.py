"""From a folder to a list of pictures with captions and repeats."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..paths import is_dir, why_absent
from ..writing import why
from .buckets import Size
from .images import BrokenPicture, read_size
from .leftover import CAPTION_TYPES, PICTURE_TYPES, by_reason, reasons
from .settings import ImageSettings

_REPEATS = re.compile(r"(\d+)_.+", re.ASCII)
_LISTED = 20
_NOT_TEXT = "(not in UTF-8)"


@dataclass(frozen=True)
class Picture:
    """One picture file. `name` is its path below the data folder, `size` its upright (width, height) in pixels.

    `folder` is the base name of the sub-folder of the data folder it comes from, or of the data folder itself;
    `captioned` whether its caption was found; `repeats` how often it counts in an epoch.
    """

    path: Path
    name: str
    folder: str
    size: Size
    caption: str
    captioned: bool
    repeats: int


@dataclass(frozen=True)
class Broken:
    """A file that cannot be read as a picture: its path below the data folder, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True)
class Scan:
    """What was found in the data folder. `repeats_rule` says in words how often pictures count and why; `left_out` are
    lines that name what else lies there, and why it is left out.
    """

    pictures: tuple[Picture, ...]
    broken: tuple[Broken, ...]
    repeats_rule: str
    left_out: tuple[str, ...] = ()

    def summary(self) -> dict[str, object]:
        """Name → value for the preflight, without the path of the data folder."""
        captioned = sum(picture.captioned for picture in self.pictures)
        return {
            "pictures": len(self.pictures),
            "captions found": captioned,
            "captions missing": len(self.pictures) - captioned,
            "repeats": self.repeats_rule,
            "broken files": [str(broken) for broken in self.broken],
            **({"left out": list(self.left_out)} if self.left_out else {}),
        }


@dataclass(frozen=True)
class _Found:
    path: Path
    name: str
    caption_file: Path | None


def scan(settings: ImageSettings) -> Scan:
    """Finds the pictures below `settings.folder` and reads their headers and captions, in the order of their names.

    Raises JobError for unusable settings; DataError when the folder is missing or holds no picture, when captions
    cannot be read, and, unless `skip_broken`, when pictures cannot be opened (all are listed).
    """
    settings.check()
    root = settings.folder
    if not is_dir(root):
        what = why_absent(root) or "is a file"
        raise DataError(f"lora_data_directory = {str(root)!r} {what}. Give the folder that holds the images.")
    found, others = _files(root, settings.filename_as_tag)
    left_out = tuple(by_reason(reasons(others, {file.name for file in found}, settings.filename_as_tag)))
    if not found:
        raise DataError(
            f"lora_data_directory = {str(root)!r}: no image in it or its sub-folders. Looked for "
            f"{' '.join(kind[1:] for kind in PICTURE_TYPES)}, hidden files left out. Check the folder."
            + (f" What lies there: {'; '.join(left_out)}." if left_out else "")
        )
    repeats, rule = _repeats(root, found)
    captions = _captions(found, settings)
    pictures, broken = [], []
    for file in found:
        folder = _folder(file.name)
        count = repeats.get(folder, 1)
        if not count:
            continue
        try:
            size = read_size(file.path)
        except BrokenPicture as error:
            broken.append(Broken(file.name, str(error)))
            continue
        caption, captioned = captions[file.name]
        pictures.append(Picture(file.path, file.name, folder or _base_name(root), size, caption, captioned, count))
    refuse_broken(broken, len(pictures), settings.skip_broken)
    return Scan(tuple(pictures), tuple(broken), rule, left_out)


def refuse_broken(broken: list[Broken], whole: int, skip: bool) -> None:
    """Raises DataError naming the broken files, unless they may be skipped and `whole` pictures remain."""
    if skip and whole:
        return
    if not broken:
        if not whole:
            raise DataError("No image is left: every folder is named 0_…, which counts its images zero times.")
        return
    advice = (
        "No other image is left. Repair or replace them."
        if skip or not whole
        else "Repair or remove them, or switch data_skip_broken on to train without them."
    )
    names = listed(map(str, broken))
    raise DataError(f"{len(broken)} of {len(broken) + whole} images cannot be read: {names}. {advice}")


def listed(names: Iterator[str] | list[str]) -> str:
    """Names for a message, separated by semicolons; all of them on lines of their own when there are many."""
    names = list(names)
    return "; ".join(names) if len(names) <= _LISTED else "\n" + "\n".join(names) + "\n"


def tags_of_name(stem: str) -> str:
    """The tags in a file name without extension: the part before `_id_`, with a comma for each underscore."""
    return stem.split("_id_")[0].replace("_", ",")


def with_trigger(trigger: str, caption: str) -> str:
    """The caption behind the trigger word; either alone when the other is empty."""
    return ", ".join(part for part in (trigger.strip(), caption) if part)


def _files(root: Path, by_name: bool) -> tuple[list[_Found], list[str]]:
    """The pictures below a folder, and the names of all other files but used captions, both in the order of names.

    `by_name`: captions are made of file names, so that none is used.
    """

    def stop(error: OSError) -> None:
        text = f"The folder {error.filename!r} cannot be read: {why(error)}. Check its permissions."
        raise DataError(text) from error

    seen, found, others = set(), [], []
    for place, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folder = Path(place)
        real = folder.resolve()
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        captions = {
            (Path(name).stem, Path(name).suffix.lower()): folder / name
            for name in sorted(files, reverse=True)
            if Path(name).suffix.lower() in CAPTION_TYPES
        }
        used = set()
        for name in files:
            path = folder / name
            if name.startswith(".") or path.suffix.lower() not in PICTURE_TYPES:
                continue
            caption = next((captions[key] for kind in CAPTION_TYPES if (key := (path.stem, kind)) in captions), None)
            found.append(_Found(path, path.relative_to(root).as_posix(), caption))
            used |= {name} if caption is None or by_name else {name, caption.name}
        others += [(folder / name).relative_to(root).as_posix() for name in files if name not in used]
    return sorted(found, key=lambda file: file.name), sorted(others)


def _folder(name: str) -> str:
    """The first folder in a name below the data folder, "" for a file directly in it."""
    first, slash, _ = name.partition("/")
    return first if slash else ""


def _base_name(root: Path) -> str:
    return root.name or root.resolve().name or "data"


def _repeats(root: Path, found: list[_Found]) -> tuple[dict[str, int], str]:
    """Repeats per sub-folder and the rule in words: N_name counts when every sub-folder with pictures is named so."""
    folders = sorted({_folder(file.name) for file in found} - {""})
    matches = {folder: _REPEATS.fullmatch(folder) for folder in folders}
    others = [folder for folder, match in matches.items() if not match]
    if not folders:
        own = _base_name(root)
        hint = f"; its own name {own!r} is not read as repeats: give the folder above it for that"
        return {}, f"each image counts once (no sub-folders{hint if _REPEATS.fullmatch(own) else ''})"
    if others:
        shown = ", ".join(map(repr, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        return {}, f"each image counts once (not named like 10_name: {shown})"
    repeats = {folder: int(match.group(1)) for folder, match in matches.items() if match}
    words = ", ".join(f"{folder} × {count}" + ("" if count else " (left out)") for folder, count in repeats.items())
    loose = sum(not _folder(file.name) for file in found)
    return repeats, f"by folder name: {words}" + (f", outside these folders × 1 ({loose})" if loose else "")


def _captions(found: list[_Found], settings: ImageSettings) -> dict[str, tuple[str, bool]]:
    """Caption and whether it was found, by the picture's name. Raises DataError naming every caption it cannot read."""
    captions, faults = {}, []
    for file in found:
        text, captioned = "", False
        if settings.filename_as_tag:
            text, captioned = tags_of_name(file.path.stem), True
        elif file.caption_file is not None:
            try:
                text, captioned = read_caption(file.caption_file), True
            except (OSError, UnicodeError) as error:
                reason = f"({why(error)})" if isinstance(error, OSError) else _NOT_TEXT
                faults.append(f"{file.caption_file.relative_to(settings.folder).as_posix()} {reason}")
        captions[file.name] = with_trigger(settings.trigger, text), captioned
    if faults:
        advice = "Save them as UTF-8 text, for example with a text editor's Save As."
        if not all(fault.endswith(_NOT_TEXT) for fault in faults):
            advice = "Check their permissions."
        raise DataError(f"{len(faults)} caption files cannot be read: {listed(list(dict.fromkeys(faults)))}. {advice}")
    return captions


def read_caption(path: Path) -> str:
    """The text of a caption file (UTF-8, or UTF-16 with its mark), its lines joined by blanks.

    Raises OSError and UnicodeError.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return " ".join(data.decode(encoding).split())
