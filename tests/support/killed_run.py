"""A run that kills its own process with SIGKILL: after a given optimizer step, or in the middle of writing a state.

    python killed_run.py ROOT {fresh|RUN_FOLDER} KILL_STEP KILL_WRITE

KILL_STEP 0 and KILL_WRITE 0 mean never; KILL_WRITE n kills half-way through the n-th state file.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import engine_case

from trainer.engine import loop, state
from trainer.engine.resume import read_job
from trainer.engine.run import Request, run
from trainer.events import EventLog

CHANGES: dict[str, object] = {
    "save_lora_name": "killed",
    "train_iterations": 20,
    "train_state_every": 3,
    "train_optimizer": "AdamW",
    "save_overwrite": True,
}


def main(root: Path, folder: str, kill_step: int, kill_write: int) -> None:
    case = engine_case.Case(root, root / "base", root / "pictures")
    step, write, writes = loop.optimizer_step, state.save_file, [0]

    def counted(session, plateau):
        loss = step(session, plateau)
        if session.step == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def torn(tensors, path, metadata):
        write(tensors, path, metadata)
        writes[0] += 1
        if writes[0] == kill_write:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    loop.optimizer_step, state.save_file = counted, torn
    if folder == "fresh":
        run(Request(case.job(**CHANGES), case.places), EventLog())
    else:
        run(Request(read_job(Path(folder)), case.places, resume=Path(folder)), EventLog())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
