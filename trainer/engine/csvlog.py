"""The CSV log of a run in TrainTrain's layout: a block of settings, one per row, then Step, Loss, Learning Rate 1, …"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from ..events import Event, Step
from ..writing import claim, why, write_whole

HEADER_KEYS = (
    "network_rank",
    "network_alpha",
    "train_learning_rate",
    "train_iterations",
    "train_lr_scheduler",
    "model_version",
    "train_optimizer",
    "save_lora_name",
)


Rows = Sequence[Sequence[object]]


def _silent(line: str) -> None:
    """Nobody hears it."""


class CsvLog:
    """A listener that writes one row per step, at once, so that a crash loses nothing that was told.

    All rows are held as well: a log that the disk did not take, or that was deleted during the run, is written anew as
    a whole at the next step; `warn` hears of it once.
    """

    def __init__(
        self, path: Path, header: Mapping[str, object], resume_step: int = 0, warn: Callable[[str], None] = _silent
    ) -> None:
        self.path = path
        self._warn, self._warned = warn, False
        self._file: IO[bytes] | None = None
        kept = _rows_until(path, resume_step, warn) if resume_step and path.is_file() else []
        self._titled = bool(kept)
        self._text = _text(kept or [[key, header.get(key, "")] for key in HEADER_KEYS])
        self._write(b"")

    def __call__(self, event: Event) -> None:
        """Write the row of a Step event; other events are not for this log."""
        if not isinstance(event, Step):
            return
        rows: list[list[object]] = []
        if not self._titled:
            rows.append(["Step", "Loss", *(f"Learning Rate {n + 1}" for n in range(len(event.rates)))])
            self._titled = True
        rows.append([event.step, repr(event.loss), *(repr(rate) for rate in event.rates)])
        added = _text(rows)
        self._text += added
        self._write(added)

    def _write(self, added: bytes) -> None:
        """Append to the file; where there is none, or the last write failed, put the whole log in its place."""
        try:
            if self._file is None or not os.path.exists(self.path):
                self.close()
                write_whole(self.path, bytes(self._text))
                self._file = open(self.path, "ab")  # noqa: SIM115 (held open for the whole run)
            else:
                self._file.write(added)
                self._file.flush()
        except OSError as error:
            self.close()
            if not self._warned:
                self._warned = True
                self._warn(f"The log {self.path.name} cannot be written: {why(error)}. It is tried again at each step.")

    def close(self) -> None:
        """Close the file; needed before Windows lets anybody move it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is written again with the rest
                self._file.close()
            self._file = None


def _text(rows: Rows) -> bytearray:
    held = io.StringIO()
    csv.writer(held).writerows(rows)
    return bytearray(held.getvalue().encode("utf-8", "surrogateescape"))


def _rows(path: Path) -> list[list[str]]:
    """The rows of a log, also of one that was saved in another encoding; none when it is no CSV file."""
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig", "replace" if wide else "surrogateescape")
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (OSError, csv.Error):
        return []


def _step(row: Sequence[str]) -> int | None:
    """The number of a row of a step, None for other rows."""
    text = row[0]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _rows_until(path: Path, step: int, warn: Callable[[str], None]) -> list[list[str]]:
    """The rows of an interrupted log up to and including `step`; none if no step was told. One that cannot be read is
    kept under another name.
    """
    rows = _rows(path)
    kept = [row for row in rows if (number := _step(row)) is None or number <= step]
    if any(row[0] == "Step" for row in kept):
        return kept
    if any(row[0] not in HEADER_KEYS for row in rows) or (not rows and path.stat().st_size):
        try:
            aside = claim(path, path, first=1)
            warn(f"The log {path.name} cannot be read and is kept as {aside.name}; a new one begins here.")
        except OSError as error:
            warn(f"The log {path.name} can neither be read nor kept aside: {why(error)}. A new one takes its place.")
    return []


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row of such a log, ours or TrainTrain's; rows that are no step are left out."""
    found = []
    for row in _rows(path):
        number = _step(row)
        if number is not None and len(row) > 1:
            with contextlib.suppress(ValueError):
                found.append((number, float(row[1])))
    return found
