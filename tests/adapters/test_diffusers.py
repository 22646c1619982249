"""Our files in diffusers: every module is matched, and its forward, a closed-form merge and our own forward agree."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_layers import BLOCKS, record, shake
from torch import Tensor, nn

from trainer.adapters.base import AdapterSpec
from trainer.adapters.file import read_lora, write_lora
from trainer.adapters.network import Network, build_network
from trainer.contracts import Layer
from trainer.models.layers import unet_layers
from trainer.models.roles import text_role

pytestmark = pytest.mark.newest
pytest.importorskip("peft")
WIDTH = 16
SPECS = {
    "lierla": (AdapterSpec("lierla", rank=4, alpha=3.0), 192),
    "c3lier": (AdapterSpec("c3lier", rank=4, alpha=3.0, conv_rank=2, conv_alpha=5.0), 278),
}


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A UNet and a text encoder with the module layout of SD1.5, a few numbers wide."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 24, 24), norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2
    )
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return unet.requires_grad_(False).eval(), CLIPTextModel(config).requires_grad_(False).eval()


def text_records(encoder: nn.Module) -> list[Layer]:
    """The linear layers of a CLIP text model under kohya's names."""
    found = []
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in path:
            role, path = text_role(path), path.removeprefix("text_model.").replace(".", "_")
            found.append(record(f"lora_te_text_model_{path}", module, "te1", "BASE", "linear", role))
    return found


def pipeline(unet: nn.Module, encoder: nn.Module):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
    )


@torch.no_grad()
def answers(unet: nn.Module, encoder: nn.Module) -> list[Tensor]:
    """What the two models give for fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700])
    text = encoder(torch.tensor([[1, 5, 9, 33, 2, 2, 2, 2], [1, 7, 7, 60, 11, 2, 2, 2]])).last_hidden_state
    return [text, unet(x, t, encoder_hidden_states=text).sample]


def merged(module: nn.Module, records: list, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of a model with W + alpha/rank · up · down written into every layer that the file names."""
    found = copy.deepcopy(module)
    paths = {id(inner): path for path, inner in module.named_modules()}
    for layer in records:
        if f"{layer.key}.alpha" not in tensors or id(layer.module) not in paths:
            continue
        down, up = (tensors[f"{layer.key}.lora_{side}.weight"].float() for side in ("down", "up"))
        scale = float(tensors[f"{layer.key}.alpha"]) / down.shape[0]
        weight = found.get_submodule(paths[id(layer.module)]).weight
        with torch.no_grad():
            weight += scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return found


def trained(spec: AdapterSpec, records: list) -> Network:
    network = build_network(records, spec, BLOCKS, "Full", ("unet", "te1"), torch.Generator().manual_seed(0)).eval()
    shake(network, size=0.3)
    return network


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, -0.5), (torch.float16, 1.0)])
def test_diffusers_merge_and_training_agree(
    models, tmp_path: Path, kind: str, dtype: torch.dtype, strength: float
) -> None:
    unet, encoder = models
    spec, unet_count = SPECS[kind]
    records = [*unet_layers(unet, "diffusers"), *text_records(encoder)]
    network = trained(spec, records)
    assert {part: len(adapters) for part, adapters in network.parts().items()} == {"unet": unet_count, "te1": 72}
    bare = answers(unet, encoder)
    with network.attached(), network.at_strength(strength):
        ours = answers(unet, encoder)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(ours, bare, strict=True))

    path = write_lora(tmp_path / "lora.safetensors", network.export(dtype, strength), {})
    tensors = read_lora(path)[0]
    by_hand = answers(*(merged(module, records, tensors) for module in models))

    pipe = pipeline(copy.deepcopy(unet), copy.deepcopy(encoder))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="ours")
    for module, count in ((pipe.unet, unet_count), (pipe.text_encoder, 72)):
        filled = [m for m in module.modules() if "ours" in getattr(m, "lora_B", {}) and m.lora_B["ours"].weight.any()]
        assert len(filled) == count
    theirs = answers(pipe.unet, pipe.text_encoder)

    for a, b, c, base in zip(ours, by_hand, theirs, bare, strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert (a - b).norm() < 2e-3 * (a - base).norm() + 1e-4
    assert all(torch.equal(now, before) for now, before in zip(answers(unet, encoder), bare, strict=True))


def test_counts_of_the_full_models_by_layout() -> None:
    """SD1.5 and SDXL UNets without weights: the numbers of modules that kohya's trainer has."""
    from diffusers import UNet2DConditionModel

    xl = {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for config, style, counts in (({"cross_attention_dim": 768}, "diffusers", (192, 278)), (xl, "sgm", (722, 788))):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        for spec, count in zip((AdapterSpec("lora", 1, 1.0), AdapterSpec("locon", 1, 1.0)), counts, strict=True):
            layers = list(unet_layers(unet, style))
            network = build_network(layers, spec, BLOCKS, "Full", ("unet",), torch.Generator())
            assert len(network) == count
