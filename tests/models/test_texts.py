"""Text encoder files beside a model: HF's and OpenCLIP's layouts, with and without prefix, into every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from trainer.errors import ModelError
from trainer.models.load import load_model

OWN = {
    "sd1": ("cond_stage_model.transformer.text_model.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models, the same ones without any text encoder, and another seed's whole model; a vocabulary."""
    root = tmp_path_factory.mktemp("texts")
    tiny.vocabulary(root / "vocabulary")
    for kind in tiny.KINDS:
        tiny.single_file(kind, root / f"{kind}.safetensors", seed=0)
        tiny.single_file(kind, root / f"{kind}-other.safetensors", seed=1)
        bare = {
            name: t
            for name, t in tiny.checkpoint(kind, 0).items()
            if not name.startswith(("cond_stage_model", "conditioner"))
        }
        save_file(bare, root / f"{kind}-bare.safetensors")
    return root


def load(root: Path, name: str, *texts: Path):
    return load_model(root / f"{name}.safetensors", text_paths=texts, vocabularies=(root / "vocabulary",))


def told(model) -> torch.Tensor:
    rows = model.encode_prompts(["a cat", "dog"])
    return rows.context_BLD if rows.pooled_BP is None else torch.cat([rows.context_BLD.flatten(1), rows.pooled_BP], 1)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("sd1", ("hf",)),
        ("sd1", ("bare",)),
        ("sd2", ("open_clip",)),
        ("sd2", ("hf",)),
        ("sdxl", ("hf", "hf")),
        ("sdxl", ("bare", "open_clip")),
    ],
)
def test_files_stand_for_the_encoders_of_another_model(root: Path, tmp_path: Path, kind: str, layouts) -> None:
    files = [tiny.encoder_file(tmp_path / f"{n}.safetensors", kind, n, layout) for n, layout in enumerate(layouts)]
    wanted = told(load(root, f"{kind}-other"))
    for name in (kind, f"{kind}-bare"):
        model = load(root, name, *reversed(files))
        torch.testing.assert_close(told(model), wanted)
        own = load(root, kind).unet.state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in model.unet.state_dict().items())
    assert not torch.allclose(told(load(root, kind)), wanted)


def test_one_of_two_is_replaced_alone(root: Path, tmp_path: Path) -> None:
    both, other = load(root, "sdxl"), load(root, "sdxl-other")
    width = tiny.SHAPES["sdxl"].texts[0][2]
    for number, mine in ((0, slice(0, width)), (1, slice(width, None))):
        file = tiny.encoder_file(tmp_path / f"{number}.safetensors", "sdxl", number, "hf")
        mixed = load(root, "sdxl", file).encode_prompts(["a cat"]).context_BLD
        one, two = (model.encode_prompts(["a cat"]).context_BLD for model in (both, other))
        torch.testing.assert_close(mixed[..., mine], two[..., mine])
        rest = slice(width, None) if number == 0 else slice(0, width)
        torch.testing.assert_close(mixed[..., rest], one[..., rest])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_whole_model_lends_its_encoders(root: Path, kind: str) -> None:
    model = load(root, f"{kind}-bare", root / f"{kind}-other.safetensors")
    torch.testing.assert_close(told(model), told(load(root, f"{kind}-other")))


def test_what_does_not_fit_is_refused_with_what_would(root: Path, tmp_path: Path) -> None:
    save_file({"encoder.block.0.layer.0.weight": torch.ones(2)}, tmp_path / "t5xxl.safetensors")
    with pytest.raises(ModelError, match=r"te: t5xxl.safetensors has no CLIP text encoder.*reads clip_l"):
        load(root, "sd1", tmp_path / "t5xxl.safetensors")
    with pytest.raises(ModelError, match="te: .*is no file"):
        load(root, "sd1", tmp_path / "nothing.safetensors")
    large = tiny.encoder_file(tmp_path / "clip_g.safetensors", "sdxl", 1, "hf")
    with pytest.raises(ModelError, match=r"te: clip_g.safetensors is 128 wide, Stable Diffusion 1.x reads 64"):
        load(root, "sd1", large)
    again = tiny.encoder_file(tmp_path / "again.safetensors", "sdxl", 1, "open_clip")
    with pytest.raises(ModelError, match="are both clip_g"):
        load(root, "sdxl", large, again)
    with pytest.raises(ModelError, match="Missing: text_encoder"):
        load(root, "sdxl-bare", large)
    style, prefix, width, layers = tiny.SHAPES["sdxl"].texts[1]
    found = tiny.converted_text(tiny.checkpoint("sdxl", 1), style, prefix, width, layers)
    found = {name: t.contiguous().clone() for name, t in found.items() if "projection" not in name}
    save_file(found, tmp_path / "headless.safetensors")
    with pytest.raises(ModelError, match="has no text_projection"):
        load(root, "sdxl", tmp_path / "headless.safetensors")
