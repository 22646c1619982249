"""Reading a single `.safetensors` or `.ckpt` file in LDM/sgm spelling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from ..writing import why
from .checkpoints import read_checkpoint
from .detect import TEXT_PREFIXES, UNET, VAE, refuse_unsupported
from .family import FAMILIES
from .infer import Tensors
from .keys_text import is_open_clip, text_to_one_spelling
from .keys_unet import plan_of_ldm, unet_names
from .keys_vae import vae_to_diffusers
from .noise import noise_of_file
from .pickles import ForeignNameError, PickleError
from .quantised import multiplied_out, refuse_packed
from .source import Source

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_VAE_PREFIXES = (VAE, "vae.", "")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file, on the CPU, in the file's precision, memory-mapped where the format allows.

    Of pickled files the tensors alone are read, and nothing in them is run. Raises ModelError when the file cannot be
    read.
    """
    try:
        path.open("rb").close()
    except OSError as error:  # the readers call a file that may not be read one that is not there
        raise ModelError(f"{path}: cannot be read ({why(error)}). Check the path and its permissions.") from error
    if path.suffix.lower() == ".safetensors":
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path.name}: not a readable safetensors file ({error}). Is the download complete?"
            ) from error
    if path.suffix.lower() in PICKLES:
        return _unpickled(path), {}
    if path.suffix.lower() == ".gguf":
        raise refuse_packed(path.name, "is a GGUF file", path.name)
    raise ModelError(f"{path.name}: a model file ends in .safetensors or .ckpt, or is a diffusers folder.")


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file. Raises ModelError."""
    try:
        return read_checkpoint(path)
    except ForeignNameError as error:
        raise ModelError(
            f"{path.name}: {error}; loading such a file elsewhere could run code, and here it is not read. Convert it"
            " to .safetensors with a tool you trust (the WebUI's checkpoint merger can) and choose that file."
        ) from error
    except (PickleError, OSError) as error:
        raise ModelError(f"{path.name}: not a readable checkpoint ({why(error)}). Is the download complete?") from error


def read_single(path: Path) -> Source:
    """The source of a single file. Raises ModelError when it is not a Stable Diffusion checkpoint."""
    tensors, metadata = read_tensors(path)
    return source_of(tensors, metadata, path.stem, path)


def source_of(tensors: Tensors, metadata: Mapping[str, str], name: str, path: Path | None = None) -> Source:
    """The source of tensors in LDM/sgm spelling, from a file or from a host's live model; they are shared, not copied.

    Prefixes are a checkpoint's: `model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`,
    `conditioner.embedders.N.`. Raises ModelError, saying what was recognised, when they are something else.
    """
    refuse_unsupported(tensors, name)
    tensors = multiplied_out(tensors, name, metadata, (UNET, VAE, *TEXT_PREFIXES))
    source = Source(name, {}, noise_of_file(tensors.keys(), metadata, path), path)
    unet = _below(tensors, UNET)
    names = unet_names(plan_of_ldm(unet))
    renamed = {old: names.to_diffusers(old) for old in unet}
    source.parts["unet"] = {new: unet[old] for old, new in renamed.items() if new}
    _tell_ignored(source, "UNet", [old for old, new in renamed.items() if not new])
    vae = _below(tensors, VAE)
    if vae:
        source.parts["vae"], ignored = vae_to_diffusers(_without_training_parts(vae))
        _tell_ignored(source, "VAE", ignored)
    _add_texts(source, tensors)
    return source


def _add_texts(source: Source, tensors: Tensors) -> None:
    """Put the text encoders into the source, wherever a family keeps them."""
    for _, family in FAMILIES.items():
        for row in family.texts:
            for prefix in row.prefixes:
                below = _below(tensors, prefix)
                if not below or row.part in source.parts:
                    continue
                source.parts[row.part], ignored = text_to_one_spelling(below)
                if is_open_clip(below):
                    source.open_clip.add(row.part)
                _tell_ignored(source, f"text encoder {row.part}", ignored)


def read_vae(path: Path) -> dict[str, Tensor]:
    """The tensors of a VAE file in diffusers spelling; it may be in any spelling, or a whole checkpoint. Raises
    ModelError."""
    tensors, metadata = read_tensors(path)
    tensors = multiplied_out(tensors, path.name, metadata)
    for prefix in _VAE_PREFIXES:
        vae = _without_training_parts(_below(tensors, prefix))
        if any(name.startswith("encoder.conv_in.") for name in vae):
            return vae_to_diffusers(vae)[0]
    some = ", ".join(list(tensors)[:3])
    raise ModelError(f"{path.name}: not a VAE of Stable Diffusion (its first tensors: {some}).")


def _below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _without_training_parts(vae: Tensors) -> dict[str, Tensor]:
    """A VAE without the discriminator and averages that its training left in the file."""
    return {name: tensor for name, tensor in vae.items() if not name.startswith(("loss.", "model_ema."))}


def _tell_ignored(source: Source, what: str, names: list[str]) -> None:
    if names:
        some = ", ".join(names[:3])
        source.warnings.append(
            f"{what}: {len(names)} tensors of {source.name} are not known and were ignored ({some})."
        )
