"""From named tensors to a model: modules are built without memory and the tensors assigned to them, so nothing is held
twice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import ModelError
from . import infer
from .base import Model
from .configured import built, number_of
from .detect import SUPPORTED
from .family import FAMILIES, Family, TextRow
from .keys_text import PROJECTION, layer_count, without_layer
from .noise import process_of
from .quantised import surplus_of_layers
from .source import Source
from .text import TextEncoder
from .tokenizer import Tokenizer, Vocabulary, find_vocabulary


def assemble(
    source: Source,
    *,
    v_pred: bool = False,
    storage: torch.dtype | None = None,
    vae_storage: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vocabularies: Sequence[Path] = (),
    resting: bool = False,
) -> Model:
    """The model of a source, to be computed with on `device`; each part rests where its tensors are until it is needed.

    On the CPU that is where they are computed with, laid out for it (see `Placement`). `resting`: the tensors are a
    host's; those already in `storage` (None: any) are adopted: same storage, no copy.

    The source is emptied on the way, so that tensors that had to be cast are freed one part at a time.
    Raises ModelError when the family is not known, tensors are missing or do not fit, or no vocabulary is there.
    """
    family = recognise(source)
    device = torch.device(device)
    where = Placement(storage, shared=resting or device.type != "cpu")
    texts = [_text_encoder(source, row, where, vocabularies) for row in family.texts]
    pooled = next((text for text in texts if text.row.pooled), None)
    unet_tensors = source.parts.pop("unet")
    unet = _unet(unet_tensors, source.configs.get("unet"), pooled, where)
    vae_tensors, vae_config = source.parts.pop("vae", None), source.configs.get("vae")
    vae = None
    if vae_tensors is not None:
        _same_latents(vae_tensors, unet, source.name)
        vae = build_vae(vae_tensors, vae_config, family, dataclasses.replace(where, storage=vae_storage))
    process, warnings = process_of(source.noise, family, v_pred, source.name)
    family = dataclasses.replace(family, base_version=family.version_for(process.prediction))
    if vae is not None and vae_config:
        warnings += _other_scale(number_of(vae.config, "scaling_factor", "VAE"), family)
        family = dataclasses.replace(family, latent_scale=number_of(vae.config, "scaling_factor", "VAE"))
    return Model(
        family,
        source.name,
        unet,
        texts,
        vae,
        process,
        path=source.path,
        warnings=(*source.warnings, *warnings),
        device=device,
    )


def _other_scale(scale: float, family: Family) -> list[str]:
    """A warning when a VAE's own latent scale is not that of the family."""
    if math.isclose(scale, family.latent_scale, rel_tol=0.01):
        return []
    return [
        f"The VAE scales its latents by {scale:g}, models of {family.label} expect {family.latent_scale:g}: it is"
        " likely one of another family. Choose a VAE made for this one, or leave vae empty."
    ]


def _same_latents(vae: Mapping[str, Tensor], unet: Any, name: str) -> None:
    """Raise ModelError when a VAE makes other latents than the UNet takes."""
    entry = "decoder.conv_in.weight"
    if entry in vae and (channels := infer.side(vae, entry, 1)) != unet.config.in_channels:
        raise ModelError(
            f"VAE: it has {channels} latent channels, the UNet of {name} takes {unet.config.in_channels}. "
            "Choose a VAE of the same family."
        )


def recognise(source: Source) -> Family:
    """The family of a source, by structure. Raises ModelError that says what was found."""
    encoders = tuple(part for part in source.parts if part.startswith("te"))
    facts = infer.unet_facts(source.parts["unet"], encoders)
    for _, family in FAMILIES.items():
        if family.matches(facts) and {row.part for row in family.texts} <= set(encoders):
            return family
    likely = next((family for _, family in FAMILIES.items() if (family.sizes == facts.sizes)), None)
    missing = [row.folder for row in likely.texts if row.part not in encoders] if likely else []
    projections = "linear" if facts.linear else "convolutional"
    what = f"{projections} projections, {'with' if facts.sizes else 'without'} size conditioning"
    lack = f" Missing: {', '.join(missing)}; a file with the UNet alone cannot be trained." if missing else ""
    raise ModelError(
        f"{source.name}: a UNet with {what} and {len(encoders)} text encoders fits no family.{lack} {SUPPORTED}."
    )


ALIGNMENT = 64
"""Bytes at which torch's own allocations on the CPU begin."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How tensors are stored (None: as they are; 8-bit floats become 16-bit ones), where they are.

    For the CPU, weights are contiguous and begin at a multiple of ALIGNMENT bytes: a matrix library chooses its kernels
    by address and strides too, and the same weights in a mapped file, which begin anywhere, would give other last bits.
    `shared` tensors, those of a host's model or those that go to another device, are left as they are.
    """

    storage: torch.dtype | None
    shared: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = self.storage
        if storage is None and tensor.is_floating_point() and tensor.element_size() == 1:
            storage = torch.float16
        placed = tensor.to(dtype=storage)
        if self.shared or type(placed) is not Tensor or placed.device.type != "cpu":
            return placed
        regular = placed.is_contiguous() and not placed.data_ptr() % ALIGNMENT
        return placed if regular else placed.clone(memory_format=torch.contiguous_format)


def _unet(
    tensors: dict[str, Tensor], config: Mapping[str, Any] | None, pooled: TextEncoder | None, where: Placement
) -> Any:
    if config is None:
        config = infer.unet_config(tensors)
        if pooled is not None and pooled.projection is not None:
            config["addition_time_embed_dim"] = infer.size_width(config, pooled.projection.out_features)
    with torch.device("meta"):
        unet = built(lambda: UNet2DConditionModel.from_config(dict(config)), config, "UNet", len(tensors))
    return assign(unet, tensors, "UNet", where)


def build_vae(tensors: dict[str, Tensor], config: Mapping[str, Any] | None, family: Family, where: Placement) -> Any:
    """A VAE with the given tensors; its configuration inferred from them where none is given."""
    config = infer.vae_config(tensors, family.latent_scale) if config is None else config
    with torch.device("meta"):
        vae = built(lambda: AutoencoderKL.from_config(dict(config)), config, "VAE", len(tensors))
    return assign(vae, tensors, "VAE", where)


def used_of_text(source: Source, row: TextRow) -> dict[str, Tensor]:
    """The tensors of a text encoder that are computed with: without a last layer that its family leaves out, and with
    the projection only where the projected text goes to the UNet.
    """
    tensors = source.parts[row.part]
    if row.drop_last and row.part in source.open_clip:
        tensors = without_layer(tensors, layer_count(tensors) - 1)
    return {name: tensor for name, tensor in tensors.items() if row.pooled or name != PROJECTION}


def _text_encoder(source: Source, row: TextRow, where: Placement, vocabularies: Sequence[Path]) -> TextEncoder:
    tensors = used_of_text(source, row)
    del source.parts[row.part]
    outer = infer.side(tensors, PROJECTION, 0) if PROJECTION in tensors else 0
    projection = tensors.pop(PROJECTION, None)
    if row.pooled and projection is None:
        raise ModelError(
            f"{source.name}: its text encoder {row.clip} has no {PROJECTION}, without which {row.clip} gives the UNet "
            "another text than the one it was trained with. Choose a complete file of this model, or give a whole "
            f"{row.clip} with te."
        )
    given = source.configs.get(row.part)
    if given is None:
        config = infer.text_config(tensors, row.activation)
    else:
        config = {name: value for name, value in given.items() if name not in ("torch_dtype", "dtype", "architectures")}
    with torch.device("meta"):
        clip = built(lambda: CLIPTextModel(CLIPTextConfig(**config)), config, f"text encoder {row.part}", len(tensors))
        layer = None if projection is None else nn.Linear(projection.shape[1], outer, bias=False)
    assign(getattr(clip, "text_model", clip), tensors, f"text encoder {row.part}", where)
    if layer is not None and projection is not None:
        assign(layer, {"weight": projection}, f"text projection of {row.part}", where)
    vocabulary = source.vocabularies.get(row.part) or _plain(find_vocabulary(vocabularies))
    return TextEncoder(clip, layer, row, Tokenizer(vocabulary, row.pad)).eval().requires_grad_(False)


def _plain(vocabulary: Vocabulary) -> Vocabulary:
    """A vocabulary that is not the model's own: the family decides how prompts are padded."""
    return dataclasses.replace(vocabulary, pad=None)


def assign(module: nn.Module, tensors: dict[str, Tensor], what: str, where: Placement) -> Any:
    """Give a module built on `meta` its tensors (the dictionary is emptied), frozen and in evaluation mode.

    Raises ModelError when tensors are missing, have another shape, or are surplus in a layer in use; other surplus ones
    are left out.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if not name.endswith("position_ids")}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ModelError(
            f"{what}: {len(missing)} of {len(expected)} tensors are missing ({', '.join(missing[:3])}); "
            "the file is incomplete."
        )
    wrong = [name for name, shape in expected.items() if tensors[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{what}: {len(wrong)} tensors do not fit the configuration; {name} is {list(tensors[name].shape)}, "
            f"{list(expected[name])} was expected."
        )
    placed = {name: where(tensors.pop(name)) for name in expected}
    strange = next(surplus_of_layers(expected, tensors), None)
    if strange is not None:
        raise ModelError(
            f"{what}: {strange} belongs to a layer in use, and this architecture has no place for it; without it the"
            " layer would be another one. Use the plain fp16, bf16 or fp32 file of this model."
        )
    tensors.clear()
    module.load_state_dict(placed, strict=False, assign=True)
    for part in module.modules():  # position numbers are no weights: no file has to bring them
        if "position_ids" in part._buffers:
            table = part.get_parameter("position_embedding.weight")
            part._buffers["position_ids"] = torch.arange(len(table), device=table.device).expand((1, -1))
    return module.eval().requires_grad_(False)
