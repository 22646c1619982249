"""The text encoders' names: transformers (4.30 to 5.x) and OpenCLIP, brought to one spelling.

The one spelling is transformers 5's: `embeddings.…`, `encoder.layers.N.…`, `final_layer_norm.…`, without the
`text_model.` prefix of earlier versions, and `text_projection.weight` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PROJECTION = "text_projection.weight"
"""What the pooled text is multiplied with."""
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_IGNORED = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask|text_projection\.bias)$")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_STACKED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names (without the file's prefix) are OpenCLIP's."""
    return any(name.startswith("transformer.resblocks.") for name in tensors)


def text_to_one_spelling(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors in the one spelling, names left over) of a text encoder; every result shares storage with what was
    given."""
    rename = _from_open_clip if is_open_clip(tensors) else _from_transformers
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if _IGNORED.search(name):
            continue
        found = rename(name, tensor)
        if not found:
            unknown.append(name)
        out.update(found)
    return out, unknown


def layer_count(tensors: Mapping[str, Tensor]) -> int:
    """The number of transformer layers of tensors in the one spelling."""
    return max((int(found[1]) + 1 for found in map(_LAYER.match, tensors) if found), default=0)


def without_layer(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors without those of one layer."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"encoder.layers.{layer}.")}


def _from_transformers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    name = name.removeprefix("text_model.")
    known = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) or name == PROJECTION
    return {name: tensor} if known else {}


def _from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "text_projection":  # OpenCLIP multiplies from the left: x @ projection
        return {PROJECTION: tensor.T}
    if name in _OPEN_CLIP_OUTER:
        return {_OPEN_CLIP_OUTER[name]: tensor}
    stacked = _STACKED.match(name)
    if stacked:
        layer, kind = stacked.groups()
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    block = _BLOCK.match(name)
    if block and block[2] in _OPEN_CLIP_LAYER:
        return {f"encoder.layers.{block[1]}.{_OPEN_CLIP_LAYER[block[2]]}.{block[3]}": tensor}
    return {}
