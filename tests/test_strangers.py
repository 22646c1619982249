"""What strangers give: JSON with limits, texts that are no paths, tensors that are no LoRA."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from adapter_layers import layers, network, shake
from safetensors.torch import save_file

from trainer import jsontext, paths
from trainer.adapters.base import AdapterSpec
from trainer.adapters.foreign import read_any
from trainer.adapters.network import Network
from trainer.errors import AdapterError
from trainer.params.files import read_json, write_json


@pytest.mark.parametrize(("text", "why"), [
    ("", "is not JSON: Expecting value in line 1"), ("[" * 150 + "]" * 150, "nested too deep"),
    ("[" * 150_000, "nested too deep"), ("9" * 401, "too long"), ("0." + "1" * 500, "too long"),
    ("NaN", "not a number"), ("1e999", "larger than any number"), ('{"a": [-1e400]}', "larger than any number"),
    ("[" + "{}," * 250_000 + "1]", "more parts"), ("[" + "1," * 1_000_001 + "1]", "more parts"),
    (b"\xff{}", "not text in UTF-8"), (" " * (jsontext.MOST_BYTES + 1), "larger than the 16 MiB"),
])  # fmt: skip
def test_json_beyond_the_limits(text: str | bytes, why: str) -> None:
    began = time.process_time()
    with pytest.raises(jsontext.JsonError, match=why):
        jsontext.parse(text)
    assert time.process_time() - began < 2


def test_json_within_them(tmp_path: Path) -> None:
    given = {"a": [1, 2.5, None, True, "é"], "b": {"c": [[[]]] * 3}, "n": 10**399}
    assert jsontext.parse(json.dumps(given)) == given
    assert jsontext.parse(b"\xef\xbb\xbf" + json.dumps(given).encode()) == given
    assert jsontext.parse('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(jsontext.JsonError, match="'a' more than once"):
        jsontext.parse('{"a": 1, "a": 2}', once=True)
    with pytest.raises(jsontext.JsonError, match="cannot be read: there is no such file"):
        jsontext.read(tmp_path / "none.json")


def test_half_a_symbol_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": "\ud800", "b": "é"})
    assert read_json(tmp_path / "a.json") == {"a": "\ud800", "b": "é"}


@pytest.mark.parametrize("text", ["a" * 5000, "/" + "a/" * 3000, "~nosuchuser/x", "a\0b", "\ud800", "", "~"])
def test_texts_that_are_no_files(text: str, tmp_path: Path) -> None:
    path = paths.expanded(text)
    assert not paths.is_file(path) and isinstance(paths.exists(path) or paths.is_dir(path), bool)
    if not paths.exists(path):
        assert paths.why_absent(path)
    assert not paths.why_absent(tmp_path)


def refused(tmp_path: Path, net: Network, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError) as caught:
        net.load(read_any(tmp_path / "a.safetensors")[0])
    return str(caught.value)


@pytest.mark.newest  # older versions of safetensors cannot write all of these
def test_tensors_of_a_lora_that_cannot_be(tmp_path: Path) -> None:
    net = network(layers(), AdapterSpec("lierla", rank=4, alpha=2.0))
    shake(net)
    good = net.export()
    name = next(name for name in good if name.endswith("lora_down.weight"))
    alpha = name.replace("lora_down.weight", "alpha")
    for what, why in (
        ({name: torch.full_like(good[name], float("nan"))}, "a.safetensors.*not finite"),
        ({name: good[name][0, 0]}, "axes"), ({name: good[name][:0]}, "axes"),
        ({alpha: torch.ones(3)}, "one number is right"),
        ({name: good[name].to(torch.complex64)}, "stored as complex64"), ({alpha: torch.tensor(1e30)}, "one number"),
    ):  # fmt: skip
        text = refused(tmp_path, net, {**good, **what})
        assert re.search(why, text) and (name in text or alpha in text), text
    assert torch.equal(net.export()[name], good[name])
