"""Files made by PEFT, diffusers and LyCORIS themselves: continued here, the model predicts what it predicted there."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.adapters.base import ADAPTERS, AdapterSpec
from trainer.adapters.dora import DoraOptions
from trainer.adapters.foreign import read_any
from trainer.adapters.lokr import LokrOptions
from trainer.adapters.network import build_network
from trainer.adapters.tucker import TuckerOptions
from trainer.errors import AdapterError
from trainer.models.layers import layers_of
from trainer.params.names import BLOCKS

pytestmark = pytest.mark.newest
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model():
    return tiny.model("sd1")


def shaken(module: nn.Module, names: tuple[str, ...] = ("lora_", "hada_", "lokr_")) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def answer(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    width = unet.config.cross_attention_dim
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, width)))
    with torch.no_grad():
        return unet(x, torch.tensor([30, 700]), context).sample


def continued(model, path: Path, kind: str, parts=("unet",), **spec):
    """A network with the file's values, and the report of its loading."""
    options = {type(option): option for option in spec.pop("options", ())}
    given = AdapterSpec(kind, **{"rank": 4, "alpha": 1.0, **spec}, options=options)
    net = build_network(layers_of(model), given, BLOCKS, "Full", parts, torch.Generator().manual_seed(0)).eval()
    return net, net.load(read_any(path)[0])


def agree(net, model, theirs: Tensor) -> None:
    bare = answer(model.unet)
    with net.attached():
        ours = answer(model.unet)
    assert (theirs - bare).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in"]


@pytest.mark.parametrize(("rslora", "patterns"), [(False, {}), (True, {}), (False, {"alpha_pattern": {"to_k": 5}})])
def test_diffusers_file_with_its_alpha_in_the_metadata(model, tmp_path: Path, rslora: bool, patterns: dict) -> None:
    from diffusers import StableDiffusionPipeline

    unet = copy.deepcopy(model.unet)
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=TARGETS, use_rslora=rslora, init_lora_weights=False, **patterns
    )
    unet.add_adapter(config)
    shaken(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    (path,) = tmp_path.glob("*.safetensors")
    net, report = continued(model, path, "lierla")
    modules = [m for m in unet.modules() if hasattr(m, "lora_A")]
    assert report.matched == len(modules) > 20 and not report.unmatched
    agree(net, model, answer(unet))


@pytest.mark.skipif(DoraOptions not in ADAPTERS.get("lierla").sections, reason="lierla has no DoRA")
def test_diffusers_file_with_dora(model, tmp_path: Path) -> None:
    """PEFT keeps one magnitude for each output."""
    from diffusers import StableDiffusionPipeline

    unet = copy.deepcopy(model.unet)
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS[:5], use_dora=True))
    shaken(unet, ("lora_A", "lora_B"))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.2)
    settings = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(unet), unet_lora_adapter_metadata=settings
    )
    (path,) = tmp_path.glob("*.safetensors")
    option = DoraOptions(use_dora=True, network_dora_axis="output")
    net, report = continued(model, path, "lierla", options=(option,))
    assert report.matched > 20 and not report.unmatched
    agree(net, model, answer(unet))
    with pytest.raises(AdapterError, match="use_dora true"):
        continued(model, path, "lierla")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_peft_folder_with_its_alpha_beside(model, tmp_path: Path, kind: str) -> None:
    configs = {
        "lora": peft.LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False),
        "loha": peft.LoHaConfig(r=4, alpha=3, target_modules=TARGETS[:5], init_weights=False),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS[:5], init_weights=False),
    }
    wrapped = peft.get_peft_model(copy.deepcopy(model.unet), configs[kind])
    shaken(wrapped)
    wrapped.save_pretrained(tmp_path)
    types = {"lora": "lierla", "loha": "loha", "lokr": "lokr"}
    rank = 2 if kind == "lokr" else 4
    net, report = continued(model, tmp_path / "adapter_model.safetensors", types[kind], rank=rank)
    assert report.matched > 20 and not report.unmatched
    agree(net, model, answer(wrapped.base_model.model))


def test_text_encoder_of_a_diffusers_file(model, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    encoder = copy.deepcopy(model.text_encoders[0].clip)
    encoder.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "fc2"], init_lora_weights=False))
    shaken(encoder)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=peft.get_peft_model_state_dict(encoder),
        text_encoder_lora_adapter_metadata=encoder.peft_config["default"].to_dict(),
    )
    (path,) = tmp_path.glob("*.safetensors")
    net, report = continued(model, path, "lierla", ("te1",))
    deltas = [m.get_delta_weight("default") for m in encoder.modules() if hasattr(m, "get_delta_weight")]
    assert report.matched == len(deltas) == 4 and not report.unmatched
    ours = [a.delta() for a in net if a.key not in report.untouched]
    for one in ours:
        assert any(one.shape == two.shape and torch.allclose(one, two, atol=1e-5) for two in deltas)


OWNERS = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
LYCORIS = {
    "lora": ("c3lier", {}, ()),
    "lora tucker": ("c3lier", {"use_tucker": True}, (TuckerOptions(network_tucker=True),)),
    "loha": ("loha", {}, ()),
    "loha tucker": ("loha", {"use_tucker": True}, (TuckerOptions(network_tucker=True),)),
    "lokr": ("lokr", {"factor": 4}, (LokrOptions(network_factor=4),)),
    "lokr tucker": (
        "lokr",
        {"factor": 4, "use_tucker": True},
        (LokrOptions(network_factor=4), TuckerOptions(network_tucker=True)),
    ),
    "lokr both": (
        "lokr",
        {"factor": 8, "decompose_both": True},
        (LokrOptions(network_factor=8, network_decompose_both=True),),
    ),
    "lokr full": ("lokr", {"full_matrix": True}, (LokrOptions(network_full_matrix=True),)),
    "lora dora": ("c3lier", {"dora_wd": True}, (DoraOptions(use_dora=True, network_dora_axis="output"),)),
    "lora dora input": (
        "c3lier",
        {"dora_wd": True, "wd_on_output": False},
        (DoraOptions(use_dora=True, network_dora_axis="input"),),
    ),
    "loha dora": ("loha", {"dora_wd": True}, (DoraOptions(use_dora=True, network_dora_axis="output"),)),
    "lokr dora": (
        "lokr",
        {"factor": 4, "dora_wd": True},
        (LokrOptions(network_factor=4), DoraOptions(use_dora=True, network_dora_axis="output")),
    ),
    "glora": ("glora", {}, ()),
    "full": ("full", {}, ()),
    "diag-oft": ("oft", {}, ()),
    "boft": ("boft", {}, ()),
}


def declared(kind: str, *options) -> bool:
    return {type(option) for option in options} <= set(ADAPTERS.get(kind).sections)


@pytest.mark.parametrize("name", [name for name, (kind, _, options) in LYCORIS.items() if declared(kind, *options)])
def test_lycoris_file(model, tmp_path: Path, name: str) -> None:
    lycoris = pytest.importorskip("lycoris")
    kind, extra, options = LYCORIS[name]
    unet = copy.deepcopy(model.unet)
    preset = tmp_path / "preset.toml"
    owners = ["BasicTransformerBlock"] if kind == "glora" else OWNERS
    preset.write_text(f'target_module = {json.dumps(owners)}\ntarget_name = []\nlora_prefix = "lycoris"\n')
    numbers = {"linear_dim": 4, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 5}
    theirs = lycoris.create_lycoris(unet, 1.0, algo=name.split()[0], preset=str(preset), **numbers, **extra)
    theirs.apply_to()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = "dora" in name and parameter.min() > 0  # magnitudes start at the lengths of the weight
            parameter.copy_(parameter * (1 + 0.1 * noise) if near_one else noise * 0.2)
    theirs.eval()
    path = tmp_path / "lycoris.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.state_dict().items()}, path)
    net, report = continued(model, path, kind, alpha=1.0, conv_rank=2, conv_alpha=1.0, options=options)
    assert report.matched == len(theirs.loras) > 20 and not report.unmatched
    agree(net, model, answer(unet))


NAMED = {
    "ia3": 'target_module = []\ntarget_name = [".*to_k", ".*to_v"]\n'
    '[name_algo_map.".*ff.net.2"]\ntrain_on_input = true\n',
    "norm": 'target_module = []\ntarget_name = [".*block.*norm.*"]\n',
    "dylora": 'target_module = ["BasicTransformerBlock"]\ntarget_name = []\n',
}


def of_lycoris(unet: nn.Module, name: str, tmp_path: Path):
    """A filled network of LyCORIS on the UNet, and its file."""
    lycoris = pytest.importorskip("lycoris")
    preset = tmp_path / "preset.toml"
    preset.write_text('lora_prefix = "lycoris"\n' + NAMED[name])
    numbers = dict.fromkeys(("linear_dim", "conv_dim"), 0 if name == "norm" else 4)
    extra = {"train_norm": True} if name == "norm" else {"block_size": 2} if name == "dylora" else {}
    algo = "lora" if name == "norm" else name
    theirs = lycoris.create_lycoris(
        unet, 1.0, algo=algo, preset=str(preset), linear_alpha=3, conv_alpha=3, **numbers, **extra
    )
    theirs.apply_to()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    path = tmp_path / "lycoris.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in theirs.eval().state_dict().items()}, path)
    return theirs, path


@pytest.mark.parametrize("name", ["ia3", "norm"])
def test_lycoris_file_of_a_type_without_rank(model, tmp_path: Path, name: str) -> None:
    unet = copy.deepcopy(model.unet)
    theirs, path = of_lycoris(unet, name, tmp_path)
    net, report = continued(model, path, name)
    assert report.matched == len(theirs.loras) == len(net) > 10 and not report.unmatched
    agree(net, model, answer(unet))


def test_lycoris_file_of_dylora(model, tmp_path: Path) -> None:
    """LyCORIS's own forward draws a rank and scales by alpha / (blocks + 1); WebUIs read the file as a LoRA of all
    ranks scaled by alpha / rank, and so do we."""
    theirs, path = of_lycoris(copy.deepcopy(model.unet), "dylora", tmp_path)
    net, report = continued(model, path, "dylora")
    assert report.matched == len(theirs.loras) > 20 and not report.unmatched
    wanted = {}
    for module in theirs.loras:
        up, down = torch.cat(list(module.up_list), 1), torch.cat(list(module.down_list))
        wanted[module.lora_name.removeprefix("lycoris_")] = (up @ down).detach() * 3 / 4
    for adapter in net:
        if adapter.key in report.untouched:
            continue
        torch.testing.assert_close(adapter.delta().flatten(1), wanted.pop(adapter.key.removeprefix("lora_unet_")))
    assert not wanted


def test_a_file_of_other_settings_says_which(model, tmp_path: Path) -> None:
    given = AdapterSpec("c3lier", rank=6, alpha=3.0, conv_rank=2, conv_alpha=5.0)
    net = build_network(layers_of(model), given, BLOCKS, "Full", ("unet",), torch.Generator().manual_seed(0))
    path = tmp_path / "a.safetensors"
    save_file(net.export(torch.float32), path)
    wanted = r"looks like network_type c3lier, network_rank 6, network_alpha 3, network_conv_rank 2, network_conv_al"
    with pytest.raises(AdapterError, match=wanted):
        continued(model, path, "c3lier", conv_rank=2)
    with pytest.raises(AdapterError, match=wanted):
        continued(model, path, "loha", conv_rank=2)
