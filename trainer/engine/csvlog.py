"""The CSV log of a run in TrainTrain's layout: a block of settings, one per row, then Step, Loss, Learning Rate 1, …"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ..events import Event, Step

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


class CsvLog:
    """A listener that writes one row per step, at once, so that a crash loses nothing that was told."""

    def __init__(self, path: Path, header: Mapping[str, object], resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_until(path, resume_step) if resume_step and path.is_file() else []
        self._titled = bool(kept)
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)
        self._writer = csv.writer(self._file)
        self._writer.writerows(kept or [[key, header.get(key, "")] for key in HEADER_KEYS])
        self._file.flush()

    def __call__(self, event: Event) -> None:
        """Write the row of a Step event; other events are not for this log."""
        if not isinstance(event, Step):
            return
        if not self._titled:
            self._writer.writerow(["Step", "Loss", *(f"Learning Rate {n + 1}" for n in range(len(event.rates)))])
            self._titled = True
        self._writer.writerow([event.step, repr(event.loss), *(repr(rate) for rate in event.rates)])
        self._file.flush()

    def close(self) -> None:
        """Close the file; needed before Windows lets anybody move it."""
        self._file.close()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """The rows of an interrupted log up to and including `step`; the title row last if no step was told."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = [row for row in rows if row and (not row[0].isdigit() or int(row[0]) <= step)]
    return kept if any(row[0] == "Step" for row in kept) else []


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row of such a log, ours or TrainTrain's."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [(int(row[0]), float(row[1])) for row in rows if len(row) > 1 and row[0].isdigit()]
