"""The layers an adapter may sit on, with the names LoRA files give them (kohya's universe)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .base import Model
from .keys import NameMap
from .keys_unet import plan_of_diffusers, unet_names
from .spellings import flat, text_spellings, unet_spellings
from .text import TextEncoder

_OWNERS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
BLOCKS = ("BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12)))


@dataclass(frozen=True)
class Layer:
    """A linear, convolutional or normalisation layer.

    `key`: its name in the LoRA files we write. `path`: its module name in diffusers (text: transformers 4) spelling.
    `part`: unet, te1 or te2. `block`: BASE, IN00–IN11, M00 or OUT00–OUT11. `kind`: linear, conv1x1, conv3x3. `owner`:
    class of the block around it. `attention`: attn1 (self), attn2 (cross) or "". `also`: other spellings of the key in
    files of other programs. Normalisation layers have the kind groupnorm or layernorm and are their own owner, so that
    no type takes them for a matrix by mistake.
    """

    key: str
    path: str
    module: nn.Module
    part: str
    block: str
    kind: str
    owner: str
    attention: str = ""
    also: tuple[str, ...] = ()


def layers_of(model: Model) -> tuple[Layer, ...]:
    """Every layer of a model that kohya's LoRA and LoCon know, and the UNet's normalisations: the UNet's, then the text
    encoders'."""
    single = len(model.text_encoders) == 1
    texts = [layer for encoder in model.text_encoders for layer in _text_layers(encoder, single)]
    return (*unet_layers(model.unet, model.family.key_style), *texts)


def aliases(layer: Layer) -> tuple[str, ...]:
    """Other spellings of a layer's key that readers must accept."""
    return layer.also


def unet_layers(unet: nn.Module, key_style: str) -> Iterator[Layer]:
    """The layers of a UNet. `key_style` is the spelling of the keys: diffusers, or sgm (the other one becomes an
    alias)."""
    names = unet_names(plan_of_diffusers(name for name, _ in unet.named_parameters()))
    for path, module in unet.named_modules():
        owner = type(module).__name__
        if owner not in _OWNERS:
            continue
        for inner, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                yield _unet_layer(f"{path}.{inner}", layer, owner, names, key_style)
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) and layer.weight is not None:
                yield _unet_layer(f"{path}.{inner}", layer, type(layer).__name__, names, key_style)


def _unet_layer(path: str, module: nn.Module, owner: str, names: NameMap, key_style: str) -> Layer:
    sgm = names.to_ldm(path)
    if sgm is None:
        raise RuntimeError(f"the UNet module {path} has no LDM name")
    key = f"lora_unet_{flat(sgm if key_style == 'sgm' else path)}"
    also = tuple(name for name in unet_spellings(path, sgm) if name != key)
    attention = next((word for word in ("attn1", "attn2") if f".{word}." in path), "")
    return Layer(key, path, module, "unet", _block(sgm), _kind(module), owner, attention, also)


def _text_layers(encoder: TextEncoder, single: bool) -> Iterator[Layer]:
    for path, module in encoder.transformer.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("encoder.layers."):
            key, *also = text_spellings(encoder.row, path, single)
            owner = "CLIPAttention" if ".self_attn." in path else "CLIPMLP"
            part = encoder.row.part
            yield Layer(key, f"text_model.{path}", module, part, "BASE", "linear", owner, "", tuple(also))


def _block(sgm: str) -> str:
    """The block of a module in LDM spelling."""
    word, number, *_ = sgm.split(".")
    if word == "middle_block":
        return "M00"
    return f"{'IN' if word == 'input_blocks' else 'OUT'}{int(number):02d}"


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "conv{}x{}".format(*module.kernel_size)
    return "linear" if isinstance(module, nn.Linear) else type(module).__name__.lower()
