"""Makes the runs of groups on the fake card and prints what happened: `python -m fake_cuda.run GROUP …`.

    python -m fake_cuda.run SDXL                what each phase of each run did on the card, as a table
    python -m fake_cuda.run modes --only iLECO  only the rows whose name has this in it
    python -m fake_cuda.run SD1.5 SDXL --json   the same as JSON, for the test: group → row → what `make` gives
    python -m fake_cuda.run sdxl:1024 --set network_rank=32 --set use_gradient_checkpointing=true
                                                one run of your own: base (demo, sd1, sdxl) and size of images

PYTHONPATH must name the repository, its `tests` folder and `tests/support`.
"""

from __future__ import annotations

from . import library

library.load()  # before torch

import argparse  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import tiny  # noqa: E402
from ldm_names import checkpoint  # noqa: E402
from PIL import Image  # noqa: E402

from trainer.engine import shortage  # noqa: E402

from . import card as cards  # noqa: E402
from . import rows  # noqa: E402
from .table import FIGURES  # noqa: E402

USUAL: dict[str, object] = {
    "format": 1,
    "mode": "LoRA",
    "network_rank": 16,
    "network_alpha": 8,
    "train_iterations": 2,
    "train_batch_size": 1,
    "train_seed": 1,
    "train_state_every": 0,
    "save_lora_name": "row",
    "data_cache": "memory",
}
STEP = "step"
SPREAD = (shortage.WHOLE, shortage.TRAINING)
"""Phases around others; when losses are read in them depends on the clock."""


class Watch:
    """Counts of the phases of one run, by name: the most of each figure, and of the steps the last one."""

    def __init__(self, card: cards.Card) -> None:
        self.card = card
        self.phases: dict[str, cards.Counts] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self.card.phase() as counts:
            yield
        before = self.phases.get(name)
        if before is not None and name != STEP:
            counts.kernels |= before.kernels
            counts.writes |= before.writes
            counts.reads |= before.reads
            counts.peak = max(counts.peak, before.peak)
        self.phases[name] = counts


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside the block the engine's phases and its optimizer steps are counted; they do what they do."""
    from trainer.engine import loop, run

    plain_phase, plain_step = shortage.phase, loop.optimizer_step

    @contextlib.contextmanager
    def phase(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with watch(name), plain_phase(name, *args, **kwargs):
            yield

    def optimizer_step(*args: Any) -> Any:
        with watch(STEP):
            return plain_step(*args)

    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if module.__name__.startswith(run.__package__) and getattr(module, "phase", None) is plain_phase:
                stack.enter_context(cards.mock.patch.object(module, "phase", phase))
        stack.enter_context(cards.mock.patch.object(loop, "optimizer_step", optimizer_step))
        yield


class Bench:
    """Base models and images below one folder, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vocabulary = tiny.vocabulary(root / "vocabulary")

    def base(self, kind: str) -> str:
        """The model of a row: the demo's, or a file of the real size whose weights are a hole."""
        if kind == "demo":
            return "demo"
        path = self.root / f"{kind}.safetensors"
        if not path.exists():
            _sparse_file(kind, path)
        return str(path)

    def images(self, size: int) -> Path:
        """A folder with four captioned grey images and a darker one beside each."""
        folder = self.root / f"images {size}"
        if not folder.is_dir():
            folder.mkdir()
            for number in range(4):
                for suffix, level in (("", 200), ("_t", 90)):
                    stem = folder / f"{number}{suffix}"
                    Image.fromarray(np.full((size, size, 3), level + number, np.uint8)).save(stem.with_suffix(".png"))
                    stem.with_suffix(".txt").write_text("a red circle on white", encoding="utf-8")
        return folder

    def job(self, row: rows.Row) -> Any:
        """The job of a row. Raises JobError where the settings refuse it."""
        from trainer.engine.catalogue import catalogue
        from trainer.modes.base import MODES
        from trainer.params.codec import load

        settings = {**USUAL, "model": self.base(row.base), **row.settings}
        images, needs = self.images(row.size), MODES.get(str(settings["mode"])).needs
        offered = {
            "folder": {"lora_data_directory": str(images)},
            "size": {"image_size(height, width)": row.size, "image_min_length": row.size},
            "pictures": {"original image": str(images / "0.png"), "target image": str(images / "0_t.png")},
            "pair_name": {"diff_target_name": "_t"},
            "prompts": {"original prompt": "a circle", "target prompt": "a square"},
        }
        for tag, values in offered.items():
            if tag in needs:
                settings = {**values, **settings}
        return load(settings, catalogue()).job


def _sparse_file(kind: str, path: Path) -> None:
    """A full-size fp16 checkpoint of zeros, which takes no room on the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in checkpoint(tiny.FULL[kind], None).items():
        if tensor.is_floating_point():
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def make(row: rows.Row, bench: Bench, number: int, room: int | None = None) -> dict[str, Any]:
    """Carry out a row: {"phases": {phase: figures}, "reads" and "writes": {place: number} of a step, "stages": those
    that its job asks for, "error": text}.
    """
    from trainer.engine.run import Request, run
    from trainer.errors import AtelierError
    from trainer.events import EventLog
    from trainer.models.base import Model
    from trainer.places import Places
    from trainer.stages.base import STAGES

    places = Places.standalone(bench.root / "models").under(bench.root / f"out {number}")
    places = dataclasses.replace(places, vocabularies=(*places.vocabularies, bench.vocabulary))
    error, stages = "", list[str]()
    with cards.inserted(room) as card:
        watch = Watch(card)
        # Reading 7 GB of zeros for the file's metadata takes long and touches no card.
        with watched(watch), cards.mock.patch.object(Model, "hash", lambda self: "0" * 64):
            try:
                job = bench.job(row)
                stages += (name for name, stage in STAGES.items() if stage.wanted(job))
                run(Request(job, places, estimates=False), EventLog())
            except AtelierError as refused:
                error = str(refused)
            except Exception:
                error = traceback.format_exc()
    step = watch.phases.get(STEP)
    return {
        "stages": stages,
        "phases": {name: figures(counts) for name, counts in watch.phases.items() if name not in SPREAD},
        "reads": dict(step.reads) if step else {},
        "writes": dict(step.writes) if step else {},
        "error": error,
    }


def figures(counts: cards.Counts) -> list[float]:
    """A phase's line of the table; see `table.FIGURES`."""
    peak = round(counts.peak / 2**20, 1)
    return [counts.kernels.total(), counts.writes.total(), counts.reads.total(), peak]


def _own(text: str, settings: list[str]) -> list[rows.Row]:
    base, _, size = text.partition(":")
    given = dict(pair.split("=", 1) for pair in settings)
    values: dict[str, object] = {}
    for name, value in given.items():
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return [rows.Row(text, values, base, int(size or 64))]


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="groups, or one BASE:SIZE")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of a run of your own")
    parser.add_argument("--room", type=float, help="GiB of tensors that the card takes; the rest is out of memory")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for group in given.what:
            chosen = rows.GROUPS[group]() if group in rows.GROUPS else _own(group, given.set)
            of_group = found.setdefault(group, {})
            for row in (row for row in chosen if given.only in row.name):
                of_group[row.name] = make(row, bench, next(numbers), given.room and int(given.room * 2**30))
                if not given.json:
                    show(row.name, of_group[row.name])
    if given.json:
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the card cannot be ended: there is no CUDA to end it with


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row for people."""
    print(f"\n{name}\n{row['error']}".rstrip())
    for phase, line in row["phases"].items():
        print(f"  {phase:24}" + "".join(f"{value:>9} {name}" for name, value in zip(FIGURES, line, strict=True)))
    for word in ("reads", "writes"):
        for place, count in row[word].items():
            print(f"  step {word} {place}: {count}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
