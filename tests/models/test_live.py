"""Comparing a loaded model with its file: what is read of the file is what safetensors itself gives, and every tensor
that is computed with has to be there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import ModelError, NotAdoptable
from trainer.models.compare import compare, stored
from trainer.models.live import Live, adopt
from trainer.models.load import load_model
from trainer.models.single import source_of

TOWER = "conditioner.embedders.1.model."
PROJECTION = f"{TOWER}text_projection"


def test_the_first_rows_are_those_of_the_file(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {
        f"{shape}.{dtype}": torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
        for dtype in kinds
        for shape in ((7,), (6, 3), (4, 2, 3, 3))
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"modelspec.title": "x"})
    with stored(path) as file, safe_open(path, framework="pt") as theirs:
        assert set(file.tensors) == set(theirs.keys()) and file.metadata == theirs.metadata()
        for name, header in file.tensors.items():
            whole = theirs.get_tensor(name)
            assert header.is_meta and header.dtype == whole.dtype
            for view, wanted in ((header, whole), (header[2:], whole[2:]), (header.chunk(3)[1], whole.chunk(3)[1])):
                for count in (1, 2, 100):
                    rows, expected = file.rows(view, count), wanted[:count].contiguous()
                    assert rows.dtype == expected.dtype and rows.shape == expected.shape
                    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8)), (name, count)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", tiny.KINDS)
def test_every_tensor_that_is_computed_with_is_compared(family: str, suffix: str, tmp_path: Path) -> None:
    path = tiny.single_file(family, tmp_path / f"m{suffix}")
    tensors = tiny.checkpoint(family)
    compare(source_of(tensors, {}, "m"), path)
    unused = ("logit_scale", "position_ids", "attn_mask")
    heads = ("model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias", *_ends_of_texts(tensors))
    assert len(heads) >= 4
    for name in heads:
        assert not name.endswith(unused)
        changed = {**tensors, name: tensors[name] + 1}
        with pytest.raises(NotAdoptable, match="changed its weights"):
            compare(source_of(changed, {}, "m"), path)
        with pytest.raises(NotAdoptable, match=r"1 of the \d+ tensors|[23] of the \d+ tensors"):
            compare(source_of({other: t for other, t in tensors.items() if other != name}, {}, "m"), path)


def _ends_of_texts(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Of each text encoder a bias of its first layer, its last norm, and what SDXL projects its text with."""
    wanted = ("layers.0.mlp.fc1.bias", "resblocks.0.attn.in_proj_weight", "final_layer_norm.bias", "ln_final.bias")
    return [name for name in tensors if name.endswith(wanted) or name == PROJECTION]


def test_parts_that_came_from_elsewhere_are_not_compared(tmp_path: Path) -> None:
    path = tiny.single_file("sdxl", tmp_path / "m.safetensors")
    tensors = tiny.checkpoint("sdxl")
    other = {name: t + 1 if name.startswith("first_stage_model.") else t for name, t in tensors.items()}
    compare(source_of(other, {}, "m"), path, ("first_stage_model.",))
    with pytest.raises(NotAdoptable, match="vae"):
        compare(source_of(other, {}, "m"), path)


def test_what_cannot_be_compared_is_not_adopted(tmp_path: Path) -> None:
    tensors = tiny.checkpoint("sd1")
    name = "model.diffusion_model.out.2.weight"
    path = tmp_path / "model.safetensors"
    for harm, said in (
        ({name: tensors[name].to(torch.int32)}, "int32"),
        ({"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, "quantised"),
    ):
        save_file({**tensors, **harm}, path)
        with pytest.raises(NotAdoptable, match=said):
            compare(source_of(tensors, {}, "m"), path)


def test_sdxl_without_its_text_projection_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    words = (tiny.vocabulary(tmp_path / "words"),)
    whole = tiny.single_file("sdxl", tmp_path / "whole.safetensors")
    tensors = load_file(whole)
    lacking = {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ModelError, match="clip_g has no text_projection"):
        load_model(tmp_path / "lacking.safetensors", vocabularies=words)
    with pytest.raises(NotAdoptable, match=r"te2 are not loaded .*text_projection"):
        adopt(Live(whole, lacking), vocabularies=words)
    with pytest.raises(ModelError, match="clip_g has no text_projection"):
        adopt(Live(tmp_path / "lacking.safetensors", lacking), vocabularies=words)
    with pytest.raises(ModelError, match="te: .*text_projection"):
        load_model(whole, text_paths=[tmp_path / "lacking.safetensors"], vocabularies=words)
    lent = load_model(tmp_path / "lacking.safetensors", text_paths=[whole], vocabularies=words)
    assert torch.equal(lent.text_encoders[1].projection.weight, tensors[PROJECTION].T)
