"""Layers for adapter tests: one of every kind that a Stable Diffusion model has, small, with kohya's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.adapters.base import Adapter, AdapterSpec
from trainer.adapters.network import Network, build_network
from trainer.contracts import Layer, Role

BLOCKS = ("BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12)))
PARTS = ("unet", "te1", "te2")


def record(
    key: str, module: nn.Module, part: str, block: str, kind: str, role: Role, also: tuple[str, ...] = ()
) -> Layer:
    """A layer whose path is its key."""
    return Layer(key, key, module, part, block, kind, role, also)


def layers() -> list[Layer]:
    """One layer of every kind; frozen."""
    torch.manual_seed(7)
    unet, te = "lora_unet_", "lora_te_text_model_encoder_layers_0_"
    down = f"{unet}down_blocks_0_"
    block = f"{down}attentions_0_transformer_blocks_0_"
    found = [
        record(f"{down}resnets_0_conv1", nn.Conv2d(6, 10, 3, padding=1), "unet", "IN01", "conv3x3", Role.CONV),
        record(f"{down}resnets_0_time_emb_proj", nn.Linear(12, 10), "unet", "IN01", "linear", Role.TIME),
        record(f"{down}resnets_0_conv_shortcut", nn.Conv2d(6, 10, 1), "unet", "IN01", "conv1x1", Role.CONV),
        record(f"{down}attentions_0_proj_in", nn.Conv2d(8, 8, 1), "unet", "IN01", "conv1x1", Role.PROJECTION),
        record(f"{block}attn1_to_q", nn.Linear(8, 8, bias=False), "unet", "IN01", "linear", Role.SELF_Q),
        record(f"{block}attn2_to_k", nn.Linear(12, 8, bias=False), "unet", "IN01", "linear", Role.CROSS_K),
        record(f"{block}ff_net_2", nn.Linear(20, 8), "unet", "M00", "linear", Role.FF_OUT),
        record(f"{down}resnets_0_norm1", nn.GroupNorm(2, 6), "unet", "IN01", "groupnorm", Role.NORM),
        record(f"{block}norm1", nn.LayerNorm(8), "unet", "IN01", "layernorm", Role.NORM),
        record(f"{down}downsamplers_0_conv", nn.Conv2d(6, 6, 3, 2, 1), "unet", "IN03", "conv3x3", Role.SAMPLER),
        record(f"{te}self_attn_k_proj", nn.Linear(12, 12), "te1", "BASE", "linear", Role.SELF_K),
        record(f"{te}mlp_fc2", nn.Linear(24, 12), "te1", "BASE", "linear", Role.FF_OUT),
    ]
    for layer in found:
        layer.module.requires_grad_(False)
        if "norm" in layer.kind:
            layer.module.weight.data.normal_(1, 0.2)
            layer.module.bias.data.normal_(0, 0.2)
    return found


def network(records: list[Layer], spec: AdapterSpec, seed: int = 0) -> Network:
    """A network on all the layers its type covers."""
    return build_network(records, spec, BLOCKS, "Full", PARTS, torch.Generator().manual_seed(seed))


def shake(adapters: Network, seed: int = 1, size: float = 0.2) -> None:
    """Give every trainable tensor random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def input_of(module: nn.Module, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch for a layer: pictures for a convolution, rows of tokens for a linear layer."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
        channels = module.in_channels if isinstance(module, nn.Conv2d) else module.num_channels
        return torch.randn((batch, channels, 5, 6), generator=generator).to(dtype)
    width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
    return torch.randn((batch, 4, width), generator=generator).to(dtype)


def with_weight(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's output with another weight, and what is added to its bias."""
    bias = module.bias if bias is None else module.bias.to(bias) + bias
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def expected(adapter: Adapter, x: Tensor, strength: float) -> Tensor:
    """The output with the weight W + strength·ΔW (and the bias likewise), from `delta` and `delta_bias` alone."""
    weight = adapter.module.weight.to(x.dtype) + strength * adapter.delta().to(x.dtype)
    shift = adapter.delta_bias()
    return with_weight(adapter.module, x, weight, None if shift is None else strength * shift.to(x.dtype))


def merged(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """ΔW of a layer of a plain LoRA file by its definition: alpha / rank · up · down."""
    down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
    product = up.flatten(1) @ down.flatten(1) * (float(tensors[f"{key}.alpha"]) / len(down))
    return product.view(len(up), *down.shape[1:])
