"""The UNet's names: which blocks it has, and its LDM/sgm ⇄ diffusers map, both by walking the names themselves."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .keys import NameMap

Levels = tuple[tuple[int, ...], ...]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LDM = re.compile(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(?:transformer_blocks\.(\d+)|(\w+))")
_DIFFUSERS = re.compile(
    r"((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions)\.(\d+)\.(?:transformer_blocks\.(\d+))?"
)


@dataclass(frozen=True)
class UnetPlan:
    """The blocks of a UNet: for each level, for each of its resnets, the depth of the transformer behind it (0 =
    none)."""

    down: Levels
    mid: int
    up: Levels


def plan_of_ldm(names: Iterable[str]) -> UnetPlan:
    """The plan of tensor names in LDM spelling, without the `model.diffusion_model.` prefix."""
    depth: dict[str, int] = defaultdict(int)
    inside: dict[str, set[str]] = defaultdict(set)
    for name in names:
        found = _LDM.match(name)
        if found:
            block, index, word = found.groups()
            inside[block].add(word or "transformer_blocks")
            if index is not None:
                depth[block] = max(depth[block], int(index) + 1)
    down: list[list[int]] = [[]]
    n = 1
    while f"input_blocks.{n}.0" in inside:
        if "op" in inside[f"input_blocks.{n}.0"]:
            down.append([])
        else:
            down[-1].append(depth.get(f"input_blocks.{n}.1", 0))
        n += 1
    up: list[list[int]] = [[]]
    n = 0
    while f"output_blocks.{n}.0" in inside:
        up[-1].append(depth.get(f"output_blocks.{n}.1", 0))
        if any("conv" in inside.get(f"output_blocks.{n}.{m}", ()) for m in (1, 2)):
            up.append([])
        n += 1
    return UnetPlan(_freeze(down), depth.get("middle_block.1", 0), _freeze(up))


def plan_of_diffusers(names: Iterable[str]) -> UnetPlan:
    """The plan of tensor or module names in diffusers spelling."""
    depth: dict[tuple[str, int], int] = defaultdict(int)
    for name in names:
        found = _DIFFUSERS.match(name)
        if found:
            block, kind, index, layer = found.groups()
            place = block, int(index)
            depth[place] = max(depth[place], int(layer) + 1 if layer is not None and kind == "attentions" else 0)

    def side(word: str) -> Levels:
        levels: list[list[int]] = []
        while (f"{word}_blocks.{len(levels)}", 0) in depth:
            block = f"{word}_blocks.{len(levels)}"
            level: list[int] = []
            while (block, len(level)) in depth:
                level.append(depth[block, len(level)])
            levels.append(level)
        return _freeze(levels)

    return UnetPlan(side("down"), depth.get(("mid_block", 0), 0), side("up"))


def unet_names(plan: UnetPlan) -> NameMap:
    """The map between the diffusers and the LDM/sgm names of a UNet with this plan."""
    pairs = dict(OUTER)

    def resnet(diffusers: str, ldm: str) -> None:
        pairs.update({f"{diffusers}.{mine}": f"{ldm}.{theirs}" for mine, theirs in RESNET.items()})

    n = 1
    for i, level in enumerate(plan.down):
        for j, depth in enumerate(level):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            if depth:
                pairs[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i + 1 < len(plan.down):
            pairs[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    if plan.mid:
        pairs["mid_block.attentions.0"] = "middle_block.1"
        resnet("mid_block.resnets.1", "middle_block.2")
    n = 0
    for i, level in enumerate(plan.up):
        for j, depth in enumerate(level):
            resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            if depth:
                pairs[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            if j + 1 == len(level) and i + 1 < len(plan.up):
                pairs[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{2 if depth else 1}.conv"
            n += 1
    return NameMap(pairs)


def _freeze(levels: Iterable[Iterable[int]]) -> Levels:
    return tuple(tuple(level) for level in levels)
