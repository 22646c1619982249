"""The VAE's names: LDM ⇄ diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .keys import NameMap

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_names(levels: int, layers: int) -> NameMap:
    """The map of a VAE with `levels` resolutions and `layers` residual blocks per level of the encoder."""
    pairs = {name: name for name in ("quant_conv", "post_quant_conv")}

    def resnet(diffusers: str, ldm: str) -> None:
        pairs.update({diffusers: ldm, f"{diffusers}.conv_shortcut": f"{ldm}.nin_shortcut"})

    for side in ("encoder", "decoder"):
        pairs.update({f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")})
        pairs[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for j in (0, 1):
            resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}")
        for mine, theirs in _ATTENTION.items():
            pairs[f"{side}.mid_block.attentions.0.{mine}"] = f"{side}.mid.attn_1.{theirs}"
    for i in range(levels):
        for j in range(layers):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        pairs[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        for j in range(layers + 1):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{levels - 1 - i}.block.{j}")
        pairs[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - i}.upsample.conv"
    return NameMap(pairs)


def vae_size(names: Iterable[str]) -> tuple[int, int]:
    """(levels, layers) of VAE tensor names in either spelling; (0, 0) when they are not a VAE's."""
    found = [re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.", name) for name in names]
    places = [(int(match[1]), int(match[2])) for match in found if match]
    return (max(i for i, _ in places) + 1, max(j for _, j in places) + 1) if places else (0, 0)


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors in today's diffusers spelling, names left over) of a VAE in LDM, old or new diffusers spelling.

    1×1 convolutions of the attention become linear (out, in); every result shares storage with what was given.
    """
    names = list(tensors)
    ldm = any(name.startswith("encoder.down.") for name in names)
    table = vae_names(*vae_size(names))
    out, unknown = {}, []
    for name, tensor in tensors.items():
        new = table.to_diffusers(name) if ldm else _today(name)
        if new is None:
            unknown.append(name)
        else:
            squeeze = ".attentions." in new and tensor.dim() == 4
            out[new] = tensor[:, :, 0, 0] if squeeze else tensor
    return out, unknown


def _today(name: str) -> str:
    """The name in today's diffusers spelling of one from before version 0.18."""
    head, dot, tail = name.partition(".attentions.0.")
    word, _, rest = tail.partition(".")
    return f"{head}{dot}{_OLD_ATTENTION[word]}.{rest}" if word in _OLD_ATTENTION else name
