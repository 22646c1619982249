"""Readers of settings: files, texts that are dropped on the page, flags, presets, paths."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from random import Random

from trainer.adapters.metadata import JOB_KEY
from trainer.cli.jobs import Given, request
from trainer.engine.catalogue import catalogue
from trainer.engine.preflight import check_before_loading, lora_path, resolve_model, resolve_texts
from trainer.engine.resume import read_job
from trainer.events import EventLog
from trainer.hosts.names import find
from trainer.params.codec import load
from trainer.params.files import read_json
from trainer.params.presets import Presets
from trainer.places import BASE_MODEL, BASE_PICTURES, ROOT, Places
from trainer.ui.fence import Fence
from trainer.ui.shelf import Shelf

from . import mutate

SHIPPED = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "presets").glob("*.json"))]


def places(root: Path) -> Places:
    """Folders below the workplace."""
    return Places.standalone(root / "models").under(root / "out").replace(presets=root / "presets")


def base(rng: Random) -> dict[str, object]:
    """Settings that are right, of one of the shipped presets."""
    raw = {"format": 1, **rng.choice(SHIPPED)}
    raw |= {"model": str(BASE_MODEL), "lora_data_directory": str(BASE_PICTURES), "save_lora_name": "x"}
    return raw


class SettingsFile:
    """A settings file, up to the checks that need no model."""

    name, cost = "settings_file", 0.004

    def __init__(self, root: Path) -> None:
        self.path, self.places = root / "job.json", places(root)

    def make(self, rng: Random) -> Callable[[], object]:
        self.path.write_bytes(mutate.as_json(rng, base(rng), rng.choice([0.005, 0.02, 0.1])))
        return self._read

    def _read(self) -> None:
        job = load(read_json(self.path), catalogue()).job
        check_before_loading(job, self.places)


class SettingsText:
    """A text that is dropped on the page: settings, or the header of a LoRA."""

    name, cost = "settings_text", 0.002

    def __init__(self, root: Path) -> None:
        self.shelf = Shelf(catalogue(), lambda: places(root))

    def make(self, rng: Random) -> Callable[[], object]:
        held = mutate.as_json(rng, base(rng), rng.choice([0.005, 0.05])).decode("utf-8", "replace")
        metadata = {JOB_KEY: held, "ss_output_name": "x"}
        given = {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        text = json.dumps(mutate.changed(rng, given, 0.05)) if rng.random() < 0.6 else held
        return lambda: self.shelf.read(text)


class Flags:
    """The command line: a job, `--set`, flags, `--resume`."""

    name, cost = "cli_flags", 0.007

    def __init__(self, root: Path) -> None:
        self.places = places(root)
        self.flags = [parameter.key for parameter in catalogue().parameters]

    def make(self, rng: Random) -> Callable[[], object]:
        names = [rng.choice(self.flags) for _ in range(rng.randrange(4))]
        words = [part for name in names for part in (f"--{name.replace('_', '-')}", str(mutate.odd(rng))[:6000])]
        sets = tuple(f"{rng.choice(self.flags)}={str(mutate.odd(rng))[:6000]}" for _ in range(rng.randrange(3)))
        job = rng.choice(["LoRA", "LoRA", str(mutate.odd(rng))[:6000]])
        given, resume = Given(sets, words), rng.random() < 0.2
        return lambda: self._read(job, given, resume)

    def _read(self, job: str, given: Given, resume: bool) -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):  # argparse's own refusals
            request(job, given, self.places, resume=resume, dry=True, log=EventLog())


class PresetFiles:
    """The user's presets: their names and what is in them."""

    name, cost = "presets", 0.004

    def __init__(self, root: Path) -> None:
        self.folder = root / "presets"
        (self.folder / "user").mkdir(parents=True)
        self.presets = Presets(self.folder)

    def make(self, rng: Random) -> Callable[[], object]:
        for left in (self.folder / "user").glob("*"):
            left.unlink()
        (self.folder / "user" / "a.json").write_bytes(mutate.as_json(rng, base(rng), 0.05))
        name = rng.choice(["a", "A", "b", str(rng.choice(mutate.TEXTS))])
        return lambda: self._read(rng, name)

    def _read(self, rng: Random, name: str) -> None:
        shelf, names = self.presets, catalogue()
        job = load(base(rng), names, complete=False).job
        rng.choice([
            lambda: shelf.load(name, names), lambda: shelf.save(name, job), lambda: shelf.delete(name), shelf.names,
        ])()  # fmt: skip


class Paths:
    """Texts in the place of every path and name."""

    name, cost = "paths", 0.01

    def __init__(self, root: Path) -> None:
        self.places = places(root)
        self.shelf = Shelf(catalogue(), lambda: self.places)
        self.holding = [parameter for parameter in catalogue().parameters if parameter.spec.holds]

    def make(self, rng: Random) -> Callable[[], object]:
        text = rng.choice([
            *mutate.TEXTS, "/".join(["a" * 250] * 30), "a/" * 2500, "~", "~root/x", "./" * 2000 + "x", "\x01",
            "é" * 2000, str(self.places.logs), "\"'", "//a/b", "~nosuchuser", "a" * 256, "😀" * 1000,
        ])  # fmt: skip
        return lambda: self._read(rng, text)

    def _read(self, rng: Random, text: str) -> None:
        parameter = rng.choice(self.holding)
        fence = Fence(self.places, self.places.logs, rng.random() < 0.5, lambda kind: ())
        ways: list[Callable[[], object]] = [
            lambda: check_before_loading(load({**base(rng), parameter.key: text}, catalogue()).job, self.places),
            lambda: resolve_model(text, self.places.checkpoints, rng.choice(["model", "vae"])),
            lambda: resolve_texts(load({**base(rng), "te": text}, catalogue()).job, self.places.text_encoders),
            lambda: find(text, "model", self.places.checkpoints, []),
            lambda: list(fence.problems({parameter.key: text}, catalogue())),
            lambda: read_job(Path(text)),
            lambda: self.shelf.log(text), lambda: self.shelf.picture(text), lambda: self.shelf.file(text),
            lambda: self.shelf.preset(text),
            lambda: lora_path(load({**base(rng), "save_lora_name": text}, catalogue()).job, self.places).exists(),
            lambda: self.places.run_folder(load({**base(rng), "save_lora_name": text}, catalogue()).job
                                           .to_dict(full=True)["save_lora_name"], datetime.now()).exists(),
        ]  # fmt: skip
        rng.choice(ways)()
