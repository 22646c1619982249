"""A run that goes on: its state, its job, its log, each damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import engine_case
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.engine.control import Control
from trainer.engine.resume import read_job
from trainer.engine.run import Request, run
from trainer.engine.state import OLD_FORMAT, STATE_FILE, _digest
from trainer.events import Event, EventLog, Step

from . import mutate

CHANGES = {
    "train_iterations": 4,
    "train_state_every": 2,
    "save_overwrite": True,
    "data_cache": "memory",
    "save_lora_name": "fuzz",
}

MOST_TEXT = 10**7


class States:
    """The files of a run folder, up to the end of the run that is resumed from them."""

    name, cost = "states", 0.6

    def __init__(self, root: Path) -> None:
        self.case = engine_case.make(root / "case")
        self.runs = []
        for optimizer in ("AdamW", "Prodigy", "Lion", "AdaFactor"):
            control = Control()

            def stop(event: Event, control: Control = control) -> None:
                if isinstance(event, Step) and event.step == 2:
                    control.stop()

            rate = {"train_learning_rate": 1.0} if optimizer == "Prodigy" else {}
            changes = {**CHANGES, "train_optimizer": optimizer, **rate}
            self.runs.append(self.case.run(stop, control=control, **changes).folder)
        self.copy = root / "case" / "copy"

    def make(self, rng: Random) -> Callable[[], object]:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(rng.choice(self.runs), self.copy)
        state, (log,), job = self.copy / STATE_FILE, self.copy.glob("*.csv"), self.copy / "job.json"
        kind = rng.randrange(10)
        if kind == 0:
            log.write_bytes(mutate.raw(rng, log.read_bytes()))
        elif kind == 1:
            job.write_bytes(mutate.as_json(rng, json.loads(job.read_text(encoding="utf-8")), 0.01))
        elif kind == 2:
            state.write_bytes(mutate.safetensors(rng, state.read_bytes()))
        else:
            with safe_open(state, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["state"])
            if kind < 6:
                held = mutate.tensors(rng, held, 0.01)
            else:
                facts = mutate.changed(rng, facts, rng.choice([0.02, 0.1]))
            if isinstance(facts, dict) and rng.random() < 0.2:
                facts["format"] = OLD_FORMAT
            said = json.dumps(facts).encode("utf-8", "replace").decode()[:MOST_TEXT]
            whole = {name: tensor.contiguous().clone() for name, tensor in held.items()}
            # Mostly with the right digest: it finds damage by chance, and what is behind it is to be read too.
            digest = _digest(whole, said) if rng.random() < 0.95 else "0" * 64
            save_file(whole, state, {"state": said, "digest": digest})
        return self._read

    def _read(self) -> None:
        """Two steps are enough: a changed job may ask for millions."""
        control, told = Control(), []

        def stop(event: Event) -> None:
            if isinstance(event, Step):
                told.append(event)
                if len(told) > 1:
                    control.stop()

        run(Request(read_job(self.copy), self.case.places, resume=self.copy, estimates=False), EventLog(stop), control)
