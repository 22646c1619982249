"""What the layers of UNets and CLIP text encoders do, by their module names in diffusers and transformers."""

from __future__ import annotations

from ..contracts import Role
from ..errors import ModelError

_UNET_ATTENTION = {
    "attn1": {"to_q": Role.SELF_Q, "to_k": Role.SELF_K, "to_v": Role.SELF_V, "to_out": Role.SELF_OUT},
    "attn2": {"to_q": Role.CROSS_Q, "to_k": Role.CROSS_K, "to_v": Role.CROSS_V, "to_out": Role.CROSS_OUT},
}
_UNET = (
    (".ff.net.0.", Role.FF_IN),
    (".ff.net.2.", Role.FF_OUT),
    (".time_emb_proj.", Role.TIME),
    ("samplers.", Role.SAMPLER),
    (".conv1.", Role.CONV),
    (".conv2.", Role.CONV),
    (".conv_shortcut.", Role.CONV),
    (".proj_in.", Role.PROJECTION),
    (".proj_out.", Role.PROJECTION),
)
_TEXT = {
    "q_proj": Role.SELF_Q,
    "k_proj": Role.SELF_K,
    "v_proj": Role.SELF_V,
    "out_proj": Role.SELF_OUT,
    "fc1": Role.FF_IN,
    "fc2": Role.FF_OUT,
}


def unet_role(path: str) -> Role:
    """The role of a linear or convolutional layer of a UNet. Raises ModelError for one that no UNet of ours has."""
    words = path.split(".")
    for attention, roles in _UNET_ATTENTION.items():
        if attention in words:
            return roles[words[words.index(attention) + 1]]
    found = next((role for part, role in _UNET if part in f".{path}."), None)
    if found is None:
        raise ModelError(f"UNet: the layer {path} has no place in Stable Diffusion 1.x, 2.x or XL.")
    return found


def text_role(path: str) -> Role:
    """The role of a linear layer of a CLIP text encoder."""
    return _TEXT[path.rpartition(".")[2]]
