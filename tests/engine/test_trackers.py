"""Runs told to the real TensorBoard and the real Weights & Biases (offline): the files hold what the CSV log holds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import engine_case
import pytest

pytestmark = pytest.mark.usefixtures("no_estimate")

OWN: dict[str, object] = {
    "train_iterations": 10, "network_rank": 2, "sample_every": 10, "sample_prompts": "a red circle", "sample_steps": 2,
    "train_optimizer": "adamw",
}  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> engine_case.Case:
    return engine_case.make(tmp_path)


def test_tensorboard_has_every_loss_rate_weight_and_picture(case) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trace = engine_case.Trace()
    result = case.run(trace, logging_trackers="tensorboard", **OWN)
    found = EventAccumulator(str(result.folder / "tensorboard"))
    found.Reload()
    told = {event.step: event.value for event in found.Scalars("loss")}
    assert told == pytest.approx(trace.losses, rel=1e-5)
    assert len(found.Scalars("learning_rate/1")) == 10
    weights = [tag for tag in found.Tags()["scalars"] if tag.startswith("mean_abs_weight/")]
    assert weights and all(found.Scalars(tag)[-1].value > 0 for tag in weights)
    assert found.Images("sample/0")[0].step == 10


def records(path: Path) -> Iterator[bytes]:
    """The records of a run file of wandb: LevelDB's log format after a header of seven bytes.

    Blocks of 32 KiB hold pieces with a header of checksum (4), length (2) and kind (1: whole, 2-4: first to last).
    """
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_weights_and_biases_offline_has_every_loss(case, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb brings a dozen packages, so it is not among those that tests install")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trace = engine_case.Trace()
    result = case.run(trace, logging_trackers="wandb", **OWN)
    (path,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    told = {}
    for data in records(path):
        items = Record.FromString(data).history.item
        values = {item.key or "/".join(item.nested_key): item.value_json for item in items}
        if "loss" in values:
            told[int(values["_step"])] = float(values["loss"])
    assert told == pytest.approx(trace.losses, rel=1e-5)
