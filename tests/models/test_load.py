"""Loading: both spellings give the same model, diffusers' converters agree, and what is not a base model is told
apart."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from diffusers.loaders import single_file_utils as theirs
from ldm_names import Shape
from ldm_names import checkpoint as every_tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import ModelError
from trainer.models.assemble import ALIGNMENT, assemble
from trainer.models.keys_vae import vae_to_diffusers
from trainer.models.load import load_model
from trainer.models.single import read_vae, source_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with every tiny model as a file and as a folder."""
    root = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        tiny.single_file(kind, root / f"{kind}.safetensors")
        tiny.folder(kind, root / kind)
    tiny.vocabulary(root / "vocabulary")
    return root


def load(files, name, **options):
    return load_model(files / name, vocabularies=[files / "vocabulary"], **options)


@torch.no_grad()
def everything(model):
    """All that a model computes, on fixed inputs."""
    rng = torch.Generator().manual_seed(5)
    x, pixels = torch.randn(2, 4, 8, 8, generator=rng), torch.rand(1, 3, 64, 64, generator=rng) * 2 - 1
    cond = model.encode_prompts(["a red ring", "x" * 90])
    ids = model.time_ids((64, 64), (0, 8), (64, 64))
    mean, std = model.encode_images(pixels)
    predicted = model.predict(x, torch.tensor([3, 800]), cond, None if ids is None else ids.expand(2, 6))
    return [
        cond.context_BLD,
        *([] if cond.pooled_BP is None else [cond.pooled_BP]),
        predicted,
        mean,
        std,
        model.decode(mean),
    ]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_file_folder_and_live_tensors_give_identical_models(files, kind):
    results = [
        everything(load(files, f"{kind}.safetensors")),
        everything(load_model(files / kind)),
        everything(tiny.model(kind)),
    ]
    for single, folder, live in zip(*results, strict=True):
        assert torch.equal(single, folder) and torch.equal(single, live)
        assert single.isfinite().all() and single.std() > 1e-3


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_are_contiguous_and_aligned_wherever_a_file_had_them(files, kind):
    model = load(files, f"{kind}.safetensors")
    with safe_open(str(files / f"{kind}.safetensors"), "pt") as file:
        assert any(file.get_tensor(name).data_ptr() % ALIGNMENT for name in file.keys())  # noqa: SIM118
    for part in (model.unet, model.vae, *model.text_encoders):
        for name, weight in part.named_parameters():
            assert weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0, name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_conversion_agrees_with_diffusers_key_for_key(kind):
    tensors = tiny.checkpoint(kind)
    source = source_of(tensors, {}, kind)
    shape = tiny.SHAPES[kind]
    unet = theirs.convert_ldm_unet_checkpoint(dict(tensors), tiny.unet_config(shape))
    vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), tiny.vae_config())
    expected = {"unet": unet, "vae": vae}
    if kind == "sd2":
        del source.parts["te1"]["text_projection.weight"]  # diffusers leaves out what SD2 does not use
    for part, (style, prefix, width, layers) in zip(("te1", "te2"), shape.texts, strict=False):
        text = tiny.converted_text(tensors, style, prefix, width, layers)
        expected[part] = {
            name.removeprefix("text_model."): tensor for name, tensor in text.items() if "position_ids" not in name
        }
    assert set(source.parts) == set(expected)
    for part, converted in expected.items():
        assert set(source.parts[part]) == set(converted)
        assert all(torch.equal(source.parts[part][name], tensor) for name, tensor in converted.items())
    assert not source.warnings


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_live_tensors_are_adopted_not_copied(kind):
    tensors = tiny.checkpoint(kind, dtype=torch.float16)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    model = tiny.model(kind, tensors=tensors, resting=True)
    parts = [model.unet, *model.text_encoders]
    held = {parameter.untyped_storage().data_ptr() for part in parts for parameter in part.parameters()}
    assert held <= pointers
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_the_files_precision_is_kept_until_it_is_cast(files, tmp_path):
    path = tiny.single_file("sd1", tmp_path / "half.safetensors", dtype=torch.float16)
    model = load_model(path, vocabularies=[files / "vocabulary"])
    assert {p.dtype for p in model.unet.parameters()} == {torch.float16} and model.storage == torch.float16
    assert model.compute == torch.float32
    cast = load_model(path, storage=torch.bfloat16, vae_storage=torch.float32, vocabularies=[files / "vocabulary"])
    assert cast.unet.conv_in.weight.dtype == torch.bfloat16 and cast.vae.dtype == torch.float32
    assert len(model.hash()) == 64 and model.hash() == cast.hash()


def test_a_pickled_file_loads_weights_only(files, tmp_path):
    path = tiny.single_file("sd1", tmp_path / "model.ckpt")
    torch.save(tiny.checkpoint("sd1"), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    places = (path, tmp_path / "old.ckpt", files / "sd1.safetensors")
    results = [everything(load_model(place, vocabularies=[files / "vocabulary"])) for place in places]
    for new, old, same in zip(*results, strict=True):
        assert torch.equal(new, same) and torch.equal(old, same)


class Trap:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_a_pickle_that_would_run_code_is_refused_with_advice(tmp_path):
    torch.save({"state_dict": tiny.checkpoint("sd1"), "callbacks": Trap()}, tmp_path / "old.ckpt")
    with pytest.raises(ModelError, match="(?s)old.ckpt.*Convert it to .safetensors"):
        load_model(tmp_path / "old.ckpt")


def test_another_vae_in_every_spelling(files, tmp_path):
    other = tiny.checkpoint("sd1", seed=9)
    plain = {
        name.removeprefix("first_stage_model."): t for name, t in other.items() if name.startswith("first_stage_model.")
    }
    save_file({**plain, "loss.discriminator.main.0.weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    save_file(other, tmp_path / "whole.safetensors")
    converted = {name: t.contiguous() for name, t in vae_to_diffusers(plain)[0].items()}
    save_file(converted, tmp_path / "diffusers.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in converted.items():
        for new, before in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        renamed[name] = tensor
    save_file(renamed, tmp_path / "old.safetensors")
    for name in ("plain", "whole", "diffusers", "old"):
        model = load(files, "sd1.safetensors", vae_path=tmp_path / f"{name}.safetensors")
        assert torch.equal(model.vae.decoder.conv_in.weight, plain["decoder.conv_in.weight"])
        assert torch.equal(
            model.vae.encoder.mid_block.attentions[0].to_q.weight, plain["encoder.mid.attn_1.q.weight"][:, :, 0, 0]
        )
    folder = tiny.folder("sd1", tmp_path / "folder", seed=9)
    for place in (folder, folder / "vae"):
        model = load(files, "sd1.safetensors", vae_path=place)
        assert torch.equal(model.vae.decoder.conv_in.weight, plain["decoder.conv_in.weight"])


def test_a_model_without_vae_says_so_when_one_is_needed(files, tmp_path):
    bare = {name: t for name, t in tiny.checkpoint("sd1").items() if not name.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    model = load_model(tmp_path / "bare.safetensors", vocabularies=[files / "vocabulary"])
    assert model.vae is None
    with pytest.raises(ModelError, match="bare: this model file has no VAE"):
        model.encode_images(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ModelError, match="16 latent channels"):
        wide = {n: t for n, t in tiny.checkpoint("sd1").items()}
        wide["first_stage_model.decoder.conv_in.weight"] = torch.zeros(64, 16, 3, 3)
        tiny.model("sd1", tensors=wide)


SLIM = Shape((0, 1, 2), 0, True, tiny.SHAPES["sdxl"].texts, sizes=16, mult=(1, 2, 4))


def test_a_slim_variant_with_uneven_depths(files):
    """As SSD-1B: no transformer (and no second resnet) in the middle, depths that differ within a level."""
    tensors = every_tensor(SLIM, 0)
    tensors = {name: t for name, t in tensors.items() if ".middle_block.2." not in name}
    tensors = {
        n: t
        for n, t in tensors.items()
        if not n.startswith("model.diffusion_model.output_blocks.1.1.transformer_blocks.1")
    }
    model = tiny.model("sdxl", tensors=tensors)
    assert model.unet.config.transformer_layers_per_block[-1] == [2]
    assert [len(a.transformer_blocks) for a in model.unet.up_blocks[0].attentions] == [2, 1]
    assert len(model.unet.mid_block.resnets) == 1
    assert everything(model)[2].isfinite().all()


def refusal(tensors, **options) -> str:
    with pytest.raises(ModelError) as caught:
        assemble(source_of(tensors, {}, "given"), **options)
    return str(caught.value)


def sd(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tiny.checkpoint("sd1"), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


ONE = torch.zeros(1)
FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": "a LoRA",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "emb_params": "a textual inversion",
    "first_stage_model.encoder.conv_in.weight": "a VAE alone",
    "decoder.conv_in.weight": "a VAE alone",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet in diffusers spelling",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder alone",
    "cap_embedder.0.weight": "Lumina 2 or Z-Image",
    "something.else": "not known .its first tensors: something.else",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_a_base_model_is_named(name):
    message = refusal({name: ONE})
    assert FOREIGN[name].split(" .")[0] in message and "Supported are Stable Diffusion 1.x, 2.x and XL" in message


def test_channel_variants_and_broken_files_are_named():
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, word in ((9, "inpainting"), (8, "pix2pix"), (5, "depth"), (12, "another architecture")):
        assert word in refusal({**tiny.checkpoint("sd1"), entry: torch.zeros(32, channels, 3, 3)})
    tensors = tiny.checkpoint("sd1")
    lost = {n: t for n, t in tensors.items() if "input_blocks.1.1.transformer_blocks.0.attn1.to_q" not in n}
    assert "UNet: 1 of" in refusal(lost) and "attn1.to_q.weight" in refusal(lost)
    no_text = {n: t for n, t in tensors.items() if not n.startswith("cond_stage_model")}
    assert "Missing: text_encoder" in refusal(no_text)
    assert "quantised" in refusal({**tensors, entry: torch.zeros(32, 4, 3, 3, dtype=torch.int8)})
    xl = tiny.checkpoint("sdxl")
    one = {n: t for n, t in xl.items() if not n.startswith("conditioner.embedders.1")}
    assert "Missing: text_encoder_2" in refusal(one)
    refiner = {n.replace("embedders.1.model", "embedders.0.model"): t for n, t in xl.items() if "embedders.0" not in n}
    assert "SDXL refiner" in refusal(refiner)
    cut = {n: t for n, t in tensors.items() if "output_blocks.5" not in n}
    assert "not those of a Stable Diffusion UNet" in refusal(cut)


def test_surplus_tensors_are_told_not_fatal():
    tensors = sd(model__diffusion_model__extra__weight=ONE, model_ema__decay=ONE)
    model = tiny.model("sd1", tensors=tensors)
    assert any("extra.weight" in warning for warning in model.warnings) and len(model.warnings) == 1


def test_paths_that_are_no_model(tmp_path, files):
    with pytest.raises(ModelError, match="there is no such model file"):
        load_model(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="broken.safetensors: not a readable safetensors file"):
        load_model(tmp_path / "broken.safetensors")
    (tmp_path / "broken.ckpt").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="broken.ckpt"):
        load_model(tmp_path / "broken.ckpt")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="ends in .safetensors or .ckpt"):
        load_model(tmp_path / "notes.txt")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="a diffusers FluxPipeline"):
        load_model(tmp_path / "flux")
    save_file({"cond_stage_model.weight": ONE}, tmp_path / "no_vae.safetensors")
    with pytest.raises(ModelError, match="not a VAE"):
        read_vae(tmp_path / "no_vae.safetensors")


def test_folder_variants(files, tmp_path):
    """Half-precision variants, shards and pickles are found; the folder's configuration rules."""
    reference = everything(load_model(files / "sd1"))
    for case in ("variant", "shards", "pickle"):
        folder = tmp_path / case
        shutil.copytree(files / "sd1", folder)
        whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(whole)
        whole.unlink()
        if case == "variant":
            save_file(tensors, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        elif case == "pickle":
            torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
        else:
            names, where = sorted(tensors), {}
            for part, some in enumerate((names[::2], names[1::2])):
                save_file({name: tensors[name] for name in some}, folder / "unet" / f"part{part}.safetensors")
                where |= {name: f"part{part}.safetensors" for name in some}
            index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": where}))
        found = everything(load_model(folder))
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    config = json.loads((files / "sd1" / "unet" / "config.json").read_text())
    (tmp_path / "variant" / "unet" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 4}))
    assert load_model(tmp_path / "variant").unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 4
