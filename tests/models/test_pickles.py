"""Pickled checkpoints: what torch wrote is read bit for bit, Lightning's too; nothing that a file names is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from trainer.errors import ModelError
from trainer.models.single import read_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    plain = {f"w{number}": torch.randn(3, 5, generator=rng).to(kind) for number, kind in enumerate(DTYPES)}
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        **plain, "turned": whole.T, "part": whole[1:3, 2:4], "scalar": torch.tensor(2.5), "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(whole * 2), "tied": whole,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool, nested: bool) -> None:
    made = tensors()
    torch.save({"state_dict": made} if nested else made, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found, _ = read_tensors(tmp_path / "a.ckpt")
    assert found.keys() == made.keys()
    for name, expected in made.items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert torch.equal(found[name].double(), expected.detach().double()), name
    found["w0"].add_(1)  # a private copy: the file does not change
    assert torch.equal(read_tensors(tmp_path / "a.ckpt")[0]["w0"], made["w0"])


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """Stand-ins of the classes that Lightning's checkpoints name; they are gone when the file is read."""
    parts = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in parts:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    made = type("ModelCheckpoint", (), {"__module__": parts[-1]})
    sys.modules[parts[-1]].ModelCheckpoint = made
    return made


def test_a_lightning_checkpoint_as_sd_1_4_was_published(tmp_path: Path, lightning: type, monkeypatch) -> None:
    weights = tiny.checkpoint("sd1")
    callback = {
        "monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.13), "best_model_path": "/a/b.ckpt",
        "current_score": np.float64(0.2), "dirpath": "/a", "best_k_models": OrderedDict(a=1),
    }  # fmt: skip
    content = {
        "epoch": 5, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "state_dict": OrderedDict(weights),
        "callbacks": {lightning: callback}, "optimizer_states": [{"state": {0: {"step": 3}}, "param_groups": []}],
        "lr_schedulers": [], "hparams": {"seen": {1, 2}, "instance": lightning()},
    }  # fmt: skip
    torch.save(content, tmp_path / "sd-v1-4.ckpt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    found, _ = read_tensors(tmp_path / "sd-v1-4.ckpt")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


class Calls:
    """What pickles as a call of anything."""

    def __init__(self, function: object, *given: object) -> None:
        self.how = function, given

    def __reduce__(self):
        return self.how


HOSTILE = {
    "system": Calls(os.system, "touch {}"), "eval": Calls(eval, "open('{}', 'w')"), "open": Calls(open, "{}", "w"),
    "exec": Calls(exec, "open('{}', 'w')"), "popen": Calls(subprocess.Popen, ["touch", "{}"]),
    "load": Calls(torch.load, "{}"),
    "getattr": Calls(getattr, "", "join"), "import": Calls(__import__, "os"), "bytes": Calls(bytearray, 10**10),
    "hub": Calls(torch.hub.load, "a/b", "c"), "map": Calls(map, print, [1]), "pickle": Calls(pickle.loads, b"N."),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_in_a_checkpoint_is_named_and_not_run(tmp_path: Path, name: str, zipped: bool) -> None:
    sign, trap = tmp_path / "run", HOSTILE[name]
    given = [part.replace("{}", str(sign)) if isinstance(part, str) else part for part in trap.how[1]]
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": Calls(trap.how[0], *given)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"(?s)a\.ckpt.*which is no part of a checkpoint.*Convert it to \.safetensors"):
        read_tensors(tmp_path / "a.ckpt")
    assert tracemalloc.get_traced_memory()[1] < 20e6 and not sign.exists()
    tracemalloc.stop()


@pytest.mark.parametrize("name", [
    b"cpytorch_lightning.callbacks\nos.system\n", b"cpytorch_lightning\nsystem\n", b"cos\nsystem\n",
    b"cpytorch_lightning os\nSystem\n", b"\x8c\x11torch._utils.eval\x8c\x04exec\x93", b"ctorch.Size\nmro\n",
    b"cbuiltins\n__import__\n", b"ctorch\n_C\n", b"cnumpy\nload\n",
])  # fmt: skip
def test_names_that_only_look_harmless(tmp_path: Path, name: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x04" + name + b".")
    with pytest.raises(ModelError, match="no part of a checkpoint"):
        read_tensors(tmp_path / "a.ckpt")


def changed(path: Path, record: str, change) -> None:
    """Write a zip file anew with one record changed."""
    with zipfile.ZipFile(path) as old:
        held = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in held.items():
            new.writestr(name, change(data) if name.endswith(record) else data)


def test_what_a_file_does_not_have_is_never_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000, 1000)}}, path)
    whole = path.read_bytes()
    cases = {}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    packed = bytearray((tmp_path / "packed.ckpt").read_bytes())
    place = packed.rindex(b"a/data/0") - 46 + 24  # the record says 10 bytes in the zip directory, and unpacks to 4 MB
    packed[place : place + 4] = struct.pack("<I", 10)
    cases["packs none"] = bytes(packed)
    at = whole.rindex(b"a/data/0") - 46 + 20
    cases["is cut off"] = whole[:at] + struct.pack("<II", 2**31, 2**31) + whole[at + 8 :]
    cases["zip directory is damaged"] = whole[: len(whole) // 2]
    changed(path, "data.pkl", lambda data: data.replace(b"M\xe8\x03M\xe8\x03", b"M\xe8\xffM\xe8\xff", 1))
    cases["shape that its weights do not fill"] = path.read_bytes()
    changed(path, "data/0", lambda data: data[:100])
    cases["are cut off"] = path.read_bytes().replace(b"M\xe8\xffM\xe8\xff", b"M\xe8\x03M\xe8\x03")
    cases["empty"] = b""
    for number, (why, content) in enumerate(cases.items()):
        (tmp_path / f"{number}.ckpt").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ModelError, match=why):
            read_tensors(tmp_path / f"{number}.ckpt")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_an_endless_pickle_is_left_alone(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 600_000 + b"}.")
    (tmp_path / "a.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match="1,000,000 instructions"):
        read_tensors(tmp_path / "a.ckpt")
