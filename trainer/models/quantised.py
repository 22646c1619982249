"""Weights that are stored in 8 bits: scaled ones are multiplied out, every other quantised storage is refused by name.

Scaled fp8, as ComfyUI writes and reads it: beside `X.weight` (float8) lies `X.scale_weight`, newer `X.weight_scale`:
one number, or one for each row, and the weight is their product. A marker `scaled_fp8` below the model's prefix, hints
for activations (`X.scale_input`, `X.input_scale`) and the layer's format as JSON text (`X.comfy_quant`, or all of them
in the metadata key `_quantization_metadata`) may be there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import ModelError, brief
from ..jsontext import JsonError, parse

METADATA = "_quantization_metadata"
MARKER, FORMAT = "scaled_fp8", "comfy_quant"
_HINTS = ("scale_input", "input_scale")
_PLAIN = ("weight", "bias")
_EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
_PACKED = frozenset({
    "qweight", "qzeros", "scales", "g_idx", "W_q", "SCB", "absmax", "quant_map", "_data", "_scale", "weight_packed",
    "weight_scale_2", "weight_scale_inv",
})  # fmt: skip
"""Tensors of bitsandbytes, GPTQ, AWQ, HQQ, quanto, NVFP4 and block-wise fp8."""
_TRAINING = ("loss.", "model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.")


def multiplied_out(
    tensors: Mapping[str, Tensor], where: str, metadata: Mapping[str, str] | None = None, below: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """The tensors with scaled fp8 weights as float16 and without what belonged to their storage.

    `below`: the name prefixes of the parts in use; what lies elsewhere is not looked at. Raises ModelError, naming a
    tensor, for every other storage that is not plain numbers.
    """
    _check_formats(metadata or {}, where)
    used = [name for name in tensors if name.startswith(below) and not name.startswith(_TRAINING)]
    scales: dict[str, str] = {}
    gone: set[str] = set()
    for name in used:
        head, _, tail = name.rpartition(".")
        if tail in _PLAIN and head not in tensors:
            _check_kind(name, tensors[name], where)
            continue
        weight = _scaled(name, head, tail, tensors)
        if weight is not None:
            scales[weight] = name
        elif tail == FORMAT:
            _check_format(tensors[name], name, where)
        elif tail != MARKER and not (tail in _HINTS and f"{head}.weight" in tensors):
            _check_companion(name, head, tail, tensors, where)
            continue
        gone.add(name)
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return {**kept, **{name: _product(name, tensors, scale, where) for name, scale in scales.items()}}


def is_scale(name: str) -> bool:
    """Whether a tensor of this name belongs to the storage of another one."""
    tail = name.rpartition(".")[2]
    return tail == "scale_weight" or tail.endswith("weight_scale") or tail in (MARKER, FORMAT) or tail in _PACKED


def refuse_packed(name: str, what: str, where: str) -> ModelError:
    """The error for a quantised model."""
    return ModelError(
        f"{where}: its weights are quantised ({brief(name)} {what}); use the fp16, bf16 or fp32 file of this model."
    )


def _scaled(name: str, head: str, tail: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The weight that a tensor is the scale of."""
    if tail == "scale_weight" and f"{head}.weight" in tensors:
        return f"{head}.weight"
    weight = name.removesuffix("_scale")
    return weight if tail.endswith("weight_scale") and weight in tensors else None


def _check_kind(name: str, tensor: Tensor, where: str) -> None:
    plain = tensor.is_floating_point() and (tensor.element_size() > 1 or tensor.dtype in _EIGHT)
    if not plain:
        raise refuse_packed(name, f"is {str(tensor.dtype).removeprefix('torch.')}", where)


def _check_companion(name: str, head: str, tail: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ModelError for a tensor that belongs to a layer in use and is neither its weight nor its bias."""
    if tail in _PACKED or f"{head}.weight" in tensors or head in tensors:
        raise refuse_packed(name, "belongs to a storage that is not known here", where)


def _product(name: str, tensors: Mapping[str, Tensor], scale_name: str, where: str) -> Tensor:
    weight, scale = tensors[name], tensors[scale_name].float()
    if weight.dtype not in _EIGHT:
        raise refuse_packed(scale_name, f"scales {str(weight.dtype).removeprefix('torch.')}", where)
    by_row = scale.ndim > 0 and weight.ndim > 0 and scale.numel() == scale.shape[0] == weight.shape[0]
    if not (scale.numel() == 1 or by_row) or not bool((scale.isfinite() & (scale > 0)).all()):
        fault = f"has shape {list(scale.shape)} for {list(weight.shape)}, or is no scale"
        raise refuse_packed(scale_name, fault, where)
    product = (weight.float() * scale.reshape(-1, *(1,) * (weight.ndim - 1))).to(torch.float16)
    if not bool(product.isfinite().all()):
        raise refuse_packed(scale_name, "makes numbers beyond the range of fp16", where)
    return product.reshape(weight.shape)


def _check_format(tensor: Tensor, name: str, where: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.numel() > 65536:
        raise refuse_packed(name, "is no description of a storage", where)
    _check_said(bytes(tensor.flatten().tolist()), name, where)


def _check_formats(metadata: Mapping[str, str], where: str) -> None:
    text = metadata.get(METADATA)
    if text is None:
        return
    try:
        said = parse(text)
    except JsonError as fault:
        raise refuse_packed(METADATA, str(fault), where) from fault
    layers = said.get("layers") if isinstance(said, dict) else None
    for layer, how in layers.items() if isinstance(layers, dict) else ():
        _check_how(how, str(layer), where)


def _check_said(text: bytes, name: str, where: str) -> None:
    try:
        _check_how(parse(text), name, where)
    except JsonError as fault:
        raise refuse_packed(name, str(fault), where) from fault


def _check_how(how: object, name: str, where: str) -> None:
    """Raise ModelError unless a layer's format is fp8 without a rotation."""
    kind = how.get("format") if isinstance(how, dict) else how
    if kind not in ("float8_e4m3fn", "float8_e5m2") or (isinstance(how, dict) and how.get("convrot")):
        raise refuse_packed(name, f"has the format {brief(how)}", where)


def surplus_of_layers(expected: Mapping[str, object], left: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of tensors left over that belong to a layer in use, which would be another one without them."""
    owners = {name.rpartition(".")[0] for name in expected} - {""}
    for name in left:
        head = name.rpartition(".")[0]
        if (head in owners or head in expected) and not name.endswith("position_ids"):
            yield name
