"""The layers an adapter may sit on, with the names LoRA files give them (kohya's universe)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..contracts import Layer, Role
from .base import Model
from .keys import NameMap
from .keys_unet import plan_of_diffusers, unet_names
from .roles import text_role, unet_role
from .spellings import flat, text_spellings, unet_spellings
from .text import TextEncoder

_OWNERS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")


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
        if type(module).__name__ not in _OWNERS:
            continue
        for inner, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                yield _unet_layer(f"{path}.{inner}", layer, unet_role(f"{path}.{inner}"), names, key_style)
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) and layer.weight is not None:
                yield _unet_layer(f"{path}.{inner}", layer, Role.NORM, names, key_style)


def _unet_layer(path: str, module: nn.Module, role: Role, names: NameMap, key_style: str) -> Layer:
    sgm = names.to_ldm(path)
    if sgm is None:
        raise RuntimeError(f"the UNet module {path} has no LDM name")
    key = f"lora_unet_{flat(sgm if key_style == 'sgm' else path)}"
    also = tuple(name for name in unet_spellings(path, sgm) if name != key)
    return Layer(key, path, module, "unet", _block(sgm), _kind(module), role, also)


def _text_layers(encoder: TextEncoder, single: bool) -> Iterator[Layer]:
    for path, module in encoder.transformer.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("encoder.layers."):
            key, *also = text_spellings(encoder.row, path, single)
            part, role = encoder.row.part, text_role(path)
            yield Layer(key, f"text_model.{path}", module, part, "BASE", "linear", role, tuple(also))


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
