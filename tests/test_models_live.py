"""Comparing a loaded model with its file: what is read of the file is what safetensors itself gives."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.models import live


def test_the_first_rows_are_those_of_the_file(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {
        f"{shape}.{dtype}": torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
        for dtype in kinds
        for shape in ((7,), (5, 3), (4, 2, 3, 3))
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"modelspec.title": "x"})
    with live._opened(path) as file, safe_open(path, framework="pt") as theirs:
        assert file.names == set(theirs.keys()) and file.metadata == theirs.metadata()
        for name in tensors:
            for count in (1, 2, 100):
                rows, wanted = file.rows(name, count), theirs.get_slice(name)[:count]
                assert rows.dtype == wanted.dtype and rows.shape == wanted.shape
                assert torch.equal(rows.view(torch.uint8), wanted.contiguous().view(torch.uint8)), (name, count)


def test_what_it_cannot_compare_is_not_adopted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(3, dtype=torch.int32)}, path)
    with live._opened(path) as file, pytest.raises(live.NotAdoptable, match="I32"):
        file.rows("a.weight", 1)
