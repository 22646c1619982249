"""Text encoders from files of their own, as WebUIs keep them: clip_l.safetensors, clip_g.safetensors, a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import ModelError
from ..paths import is_file
from .family import FAMILIES, Family, TextRow
from .infer import context_width, side, unet_facts
from .keys_text import PROJECTION, is_open_clip, layer_count, text_to_one_spelling
from .quantised import multiplied_out
from .single import read_tensors
from .source import Source

_PREFIXES = ("", "text_encoder.", "text_encoder_2.", "transformer.", "model.", "clip_l.", "clip_g.", "clip_h.")
_TOKENS = "embeddings.token_embedding.weight"
_FULL_TOWER = 24
"""Layers of OpenCLIP's ViT-H, whose last one the models that use it leave out."""


def replace_texts(source: Source, paths: Sequence[Path]) -> None:
    """Put the text encoders of files in the place of a source's own, or where it has none. Raises ModelError.

    Which one a file is for follows from its width: the UNet reads them side by side.
    """
    family = _family(source)
    given: dict[str, str] = {}
    for path in paths:
        for tensors, open_clip in _encoders(path, family):
            row = _row(tensors, source, family, path)
            if row.part in given:
                raise ModelError(f"te: {given[row.part]} and {path.name} are both {row.clip}; give one of them.")
            given[row.part] = path.name
            _put(source, row, tensors, open_clip, path)
    _check_widths(source, family, ", ".join(path.name for path in paths))


def _family(source: Source) -> Family:
    """The family of a source by its UNet alone."""
    unet = source.parts["unet"]
    for _, family in FAMILIES.items():
        if family.matches(unet_facts(unet, tuple(row.part for row in family.texts))):
            return family
    raise ModelError(f"{source.name}: text encoder files are for Stable Diffusion 1.x, 2.x and XL; leave te empty.")


def _encoders(path: Path, family: Family) -> list[tuple[dict[str, Tensor], bool]]:
    """Every CLIP text encoder in a file, in the one spelling, and whether it came in OpenCLIP's."""
    if not is_file(path):
        raise ModelError(f"te: {path} is no file. Give the path of a text encoder, as in clip_l.safetensors.")
    tensors, metadata = read_tensors(path)
    tensors = multiplied_out(tensors, path.name, metadata)
    inside = [prefix for row in family.texts for prefix in row.prefixes]
    found = []
    for prefix in (*inside, *_PREFIXES):
        below = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        one, _ = text_to_one_spelling(below)
        if _TOKENS in one and layer_count(one):
            found.append((one, is_open_clip(below)))
            if not prefix or prefix not in inside:
                break
    if not found:
        some = ", ".join(list(tensors)[:3]) or "none at all"
        raise ModelError(
            f"te: {path.name} has no CLIP text encoder (its first tensors: {some}). {family.label} reads"
            f" {' and '.join(row.clip for row in family.texts)}."
        )
    return found


def _row(tensors: dict[str, Tensor], source: Source, family: Family, path: Path) -> TextRow:
    """Which text encoder of the family this is, by its width."""
    width, context = _width(tensors), _context(source)
    if len(family.texts) == 1:
        (row,) = family.texts
        right = width == context
    else:
        row = family.texts[0] if 2 * width < context else family.texts[1]
        right = width < context
    if not right:
        raise ModelError(
            f"te: {path.name} is {width} wide, {family.label} reads {context} numbers of"
            f" {' and '.join(row.clip for row in family.texts)}. Choose the encoder of this kind of model."
        )
    return row


def _put(source: Source, row: TextRow, tensors: dict[str, Tensor], open_clip: bool, path: Path) -> None:
    if row.pooled and PROJECTION not in tensors:
        raise ModelError(
            f"te: {path.name} has no text_projection, which {row.clip} needs. Choose a file with it (the"
            " `text_encoder_2` of a diffusers model has it)."
        )
    source.parts[row.part] = tensors
    whole = open_clip or (row.drop_last and layer_count(tensors) == _FULL_TOWER)
    source.open_clip = (source.open_clip - {row.part}) | ({row.part} if whole else set())
    source.configs = {part: config for part, config in source.configs.items() if part != row.part}


def _check_widths(source: Source, family: Family, names: str) -> None:
    """Raise ModelError when the encoders there are now are not together what the UNet reads."""
    rows = [row for row in family.texts if row.part in source.parts]
    width, context = sum(_width(source.parts[row.part]) for row in rows), _context(source)
    if len(rows) == len(family.texts) and width != context:
        raise ModelError(f"te: with {names} the text is {width} wide, and {source.name} reads {context} numbers.")


def _width(tensors: dict[str, Tensor]) -> int:
    return side(tensors, _TOKENS, 1)


def _context(source: Source) -> int:
    """The width of the text the UNet reads."""
    return context_width(source.parts["unet"])
