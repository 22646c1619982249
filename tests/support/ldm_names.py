"""Writes out the tensors of a Stable Diffusion checkpoint by the rules of the LDM, sgm and OpenCLIP code, at any size.

Independent of the trainer's name maps on purpose: the tests compare the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS, WINDOW = 49408, 77
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one tiny model: transformer depth per level and in the middle, text widths, whether projections are
    linear."""

    depth: tuple[int, ...]
    mid: int
    linear: bool
    texts: tuple[tuple[str, str, int, int], ...]  # (kind, prefix, width, layers)
    sizes: int = 0  # width of the embedding of one size number
    mult: tuple[int, ...] = (1, 2, 2)
    width: int = 32
    layers: int = 1
    vae: tuple[int, ...] = (32, 32, 64, 64)
    vae_layers: int = 1

    @property
    def context(self) -> int:
        return sum(width for _, _, width, _ in self.texts)


class Writer:
    """Collects random tensors under their names; without a seed, tensors on `meta` that have only a shape."""

    def __init__(self, seed: int | None) -> None:
        self.rng = None if seed is None else torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def random(self, name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        if self.rng is None:
            self.tensors[name] = torch.empty(shape, device="meta")
            return
        std = 0.7 / math.sqrt(math.prod(shape[1:]) or 1) if std is None else std
        self.tensors[name] = torch.randn(shape, generator=self.rng) * std + mean

    def linear(self, name: str, out: int, into: int, bias: bool = True) -> None:
        self.random(f"{name}.weight", out, into)
        if bias:
            self.random(f"{name}.bias", out, std=0.05)

    def conv(self, name: str, out: int, into: int, kernel: int) -> None:
        self.random(f"{name}.weight", out, into, kernel, kernel)
        self.random(f"{name}.bias", out, std=0.05)

    def norm(self, name: str, width: int) -> None:
        self.random(f"{name}.weight", width, std=0.1, mean=1.0)
        self.random(f"{name}.bias", width, std=0.05)


def checkpoint(shape: Shape, seed: int | None) -> Tensors:
    """All tensors of a checkpoint."""
    writer = Writer(seed)
    unet(writer, shape)
    vae(writer, shape)
    for style, prefix, width, layers in shape.texts:
        (clip if style == "clip" else open_clip)(writer, prefix, width, layers)
    return writer.tensors


def unet(w: Writer, shape: Shape, p: str = "model.diffusion_model.") -> None:
    """An LDM UNet."""
    embedding = 4 * shape.width
    w.linear(f"{p}time_embed.0", embedding, shape.width)
    w.linear(f"{p}time_embed.2", embedding, embedding)
    if shape.sizes:
        w.linear(f"{p}label_emb.0.0", embedding, shape.texts[-1][2] + 6 * shape.sizes)
        w.linear(f"{p}label_emb.0.2", embedding, embedding)
    w.conv(f"{p}input_blocks.0.0", shape.width, 4, 3)
    channels, n, skips = shape.width, 1, [shape.width]
    for level, mult in enumerate(shape.mult):
        for _ in range(shape.layers):
            _resnet(w, f"{p}input_blocks.{n}.0", channels, mult * shape.width, embedding)
            channels = mult * shape.width
            _transformer(w, f"{p}input_blocks.{n}.1", channels, shape.depth[level], shape)
            skips.append(channels)
            n += 1
        if level + 1 < len(shape.mult):
            w.conv(f"{p}input_blocks.{n}.0.op", channels, channels, 3)
            skips.append(channels)
            n += 1
    _resnet(w, f"{p}middle_block.0", channels, channels, embedding)
    _transformer(w, f"{p}middle_block.1", channels, shape.mid, shape)
    _resnet(w, f"{p}middle_block.2", channels, channels, embedding)
    n = 0
    for level in reversed(range(len(shape.mult))):
        for j in range(shape.layers + 1):
            width = shape.mult[level] * shape.width
            _resnet(w, f"{p}output_blocks.{n}.0", channels + skips.pop(), width, embedding)
            channels = width
            _transformer(w, f"{p}output_blocks.{n}.1", channels, shape.depth[level], shape)
            if level and j == shape.layers:
                w.conv(f"{p}output_blocks.{n}.{2 if shape.depth[level] else 1}.conv", channels, channels, 3)
            n += 1
    w.norm(f"{p}out.0", channels)
    w.conv(f"{p}out.2", 4, channels, 3)


def _resnet(w: Writer, name: str, into: int, out: int, embedding: int) -> None:
    w.norm(f"{name}.in_layers.0", into)
    w.conv(f"{name}.in_layers.2", out, into, 3)
    w.linear(f"{name}.emb_layers.1", out, embedding)
    w.norm(f"{name}.out_layers.0", out)
    w.conv(f"{name}.out_layers.3", out, out, 3)
    if into != out:
        w.conv(f"{name}.skip_connection", out, into, 1)


def _transformer(w: Writer, name: str, width: int, depth: int, shape: Shape) -> None:
    if not depth:
        return
    w.norm(f"{name}.norm", width)
    for word in ("proj_in", "proj_out"):
        if shape.linear:
            w.linear(f"{name}.{word}", width, width)
        else:
            w.conv(f"{name}.{word}", width, width, 1)
    for layer in range(depth):
        block = f"{name}.transformer_blocks.{layer}"
        for word, context in (("attn1", width), ("attn2", shape.context)):
            w.linear(f"{block}.{word}.to_q", width, width, bias=False)
            w.linear(f"{block}.{word}.to_k", width, context, bias=False)
            w.linear(f"{block}.{word}.to_v", width, context, bias=False)
            w.linear(f"{block}.{word}.to_out.0", width, width)
        w.linear(f"{block}.ff.net.0.proj", 8 * width, width)
        w.linear(f"{block}.ff.net.2", width, 4 * width)
        for k in (1, 2, 3):
            w.norm(f"{block}.norm{k}", width)


def vae(w: Writer, shape: Shape, p: str = "first_stage_model.") -> None:
    """An LDM VAE with a factor of 2 per level after the first."""
    widths, layers = shape.vae, shape.vae_layers

    def resnet(name: str, into: int, out: int) -> None:
        w.norm(f"{name}.norm1", into)
        w.conv(f"{name}.conv1", out, into, 3)
        w.norm(f"{name}.norm2", out)
        w.conv(f"{name}.conv2", out, out, 3)
        if into != out:
            w.conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.block_1", width, width)
        w.norm(f"{name}.attn_1.norm", width)
        for word in ("q", "k", "v", "proj_out"):
            w.conv(f"{name}.attn_1.{word}", width, width, 1)
        resnet(f"{name}.block_2", width, width)

    w.conv(f"{p}encoder.conv_in", widths[0], 3, 3)
    channels = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            resnet(f"{p}encoder.down.{i}.block.{j}", channels, width)
            channels = width
        if i + 1 < len(widths):
            w.conv(f"{p}encoder.down.{i}.downsample.conv", channels, channels, 3)
    middle(f"{p}encoder.mid", channels)
    w.norm(f"{p}encoder.norm_out", channels)
    w.conv(f"{p}encoder.conv_out", 8, channels, 3)
    w.conv(f"{p}decoder.conv_in", channels, 4, 3)
    middle(f"{p}decoder.mid", channels)
    for i in reversed(range(len(widths))):
        for j in range(layers + 1):
            resnet(f"{p}decoder.up.{i}.block.{j}", channels, widths[i])
            channels = widths[i]
        if i:
            w.conv(f"{p}decoder.up.{i}.upsample.conv", channels, channels, 3)
    w.norm(f"{p}decoder.norm_out", channels)
    w.conv(f"{p}decoder.conv_out", 3, channels, 3)
    w.conv(f"{p}quant_conv", 8, 8, 1)
    w.conv(f"{p}post_quant_conv", 4, 4, 1)


def clip(w: Writer, p: str, width: int, layers: int) -> None:
    """A text tower in transformers' spelling."""
    w.random(f"{p}embeddings.token_embedding.weight", TOKENS, width, std=0.3)
    w.random(f"{p}embeddings.position_embedding.weight", WINDOW, width, std=0.1)
    w.tensors[f"{p}embeddings.position_ids"] = torch.arange(WINDOW).unsqueeze(0)
    for i in range(layers):
        for word in ("k_proj", "v_proj", "q_proj", "out_proj"):
            w.linear(f"{p}encoder.layers.{i}.self_attn.{word}", width, width)
        w.norm(f"{p}encoder.layers.{i}.layer_norm1", width)
        w.norm(f"{p}encoder.layers.{i}.layer_norm2", width)
        w.linear(f"{p}encoder.layers.{i}.mlp.fc1", 4 * width, width)
        w.linear(f"{p}encoder.layers.{i}.mlp.fc2", width, 4 * width)
    w.norm(f"{p}final_layer_norm", width)


def open_clip(w: Writer, p: str, width: int, layers: int) -> None:
    """A text tower in OpenCLIP's spelling."""
    w.random(f"{p}token_embedding.weight", TOKENS, width, std=0.3)
    w.random(f"{p}positional_embedding", WINDOW, width, std=0.1)
    w.random(f"{p}text_projection", width, width)
    w.tensors[f"{p}logit_scale"] = torch.tensor(4.6)
    for i in range(layers):
        block = f"{p}transformer.resblocks.{i}"
        w.random(f"{block}.attn.in_proj_weight", 3 * width, width)
        w.random(f"{block}.attn.in_proj_bias", 3 * width, std=0.05)
        w.linear(f"{block}.attn.out_proj", width, width)
        w.norm(f"{block}.ln_1", width)
        w.norm(f"{block}.ln_2", width)
        w.linear(f"{block}.mlp.c_fc", 4 * width, width)
        w.linear(f"{block}.mlp.c_proj", width, 4 * width)
    w.norm(f"{p}ln_final", width)
