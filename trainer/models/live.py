"""Adopting a model that is loaded in another program: its tensors go into our own modules and share their storage.

Nothing of the other program is changed by it. Its modules may be patched, and their parameters may be inference
tensors, which autograd refuses; ours are plain modules around normal tensors on the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import NotAdoptable
from . import noise
from .assemble import assemble
from .base import Model
from .compare import compare
from .detect import UNET, VAE
from .load import replace_vae
from .quantised import is_scale
from .room import best_device
from .single import source_of
from .texts import replace_texts

PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Live:
    """A model that another program has loaded, as plain facts.

    `tensors` have the names of a checkpoint file in LDM/sgm spelling; `path` is that file. `prediction` is what the
    program takes the model for (None: not known), `sha256` the file's hash where it is known already, `foreign` the
    name prefixes of parts that did not come from the file (another VAE).
    """

    path: Path
    tensors: Mapping[str, Tensor]
    prediction: str | None = None
    sha256: str = ""
    foreign: tuple[str, ...] = ()


def adopt(
    live: Live,
    *,
    v_pred: bool = False,
    storage: torch.dtype | None = None,
    vae_path: Path | None = None,
    text_paths: Sequence[Path] = (),
    vae_storage: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vocabularies: Sequence[Path] = (),
) -> Model:
    """Our own modules around the tensors of a loaded model.

    They are computed with on `device` (None: the best there is) and rest where they are until they are needed, and
    again afterwards. Where neither device nor precision changes, nothing is copied. Raises NotAdoptable when the
    tensors are quantised, spread over devices, or are not all of those in the file; ModelError as for a file.
    """
    check_plain(live.tensors)
    tensors = {name: normal(tensor) for name, tensor in live.tensors.items()}
    source = source_of(tensors, {}, live.path.stem, live.path)
    source.noise = _noise(live, *compare(source, live.path, live.foreign))
    if vae_path is not None:
        replace_vae(source, vae_path)
    if text_paths:
        replace_texts(source, text_paths)
    model = assemble(
        source,
        v_pred=v_pred,
        storage=storage,
        vae_storage=vae_storage,
        device=best_device() if device is None else device,
        vocabularies=vocabularies,
        resting=True,
    )
    model.set_home(model.parts, storages(live.tensors.values()))
    model.known_hash(live.sha256)
    return model


def normal(tensor: Tensor) -> Tensor:
    """A normal tensor, without gradient, on the storage of another one, which may be an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and size in bytes of the distinct storages behind tensors."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def copied_bytes(model: Model, live: Live) -> int:
    """Bytes of a model's weights that do not lie in the storages of the loaded one."""
    mine = storages(p for part in model.parts for p in part.parameters())
    theirs = storages(live.tensors.values())
    return sum(size for address, size in mine.items() if address not in theirs)


def check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Raise NotAdoptable unless all tensors are dense ones of a usual precision and the UNet lies on one device."""
    devices = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise NotAdoptable(f"its weights are packed ({name} is {type(tensor).__name__})")
        if name.endswith(".weight") and tensor.dtype not in PLAIN:
            raise NotAdoptable(f"its weights are quantised ({name} is {_plainly(tensor.dtype)})")
        if is_scale(name):
            raise NotAdoptable(f"its weights are quantised ({name} belongs to their storage)")
        if tensor.is_meta:
            raise NotAdoptable("it is not in memory at the moment")
        if name.startswith(UNET):
            devices.add(tensor.device)
    if len(devices) > 1:
        raise NotAdoptable(f"it is spread over {' and '.join(sorted(map(str, devices)))}")


def _noise(live: Live, names: frozenset[str], metadata: Mapping[str, str]) -> noise.NoiseFacts:
    """What the file says of the prediction type; where it is silent, what the program takes the model for."""
    facts = noise.noise_of_file(names, metadata, live.path)
    if facts.prediction is None and live.prediction is not None:
        return noise.NoiseFacts(live.prediction, facts.zero_snr, facts.alphas_T)
    return facts


def is_vae(path: Path) -> bool:
    """Whether a file holds a VAE and no whole model, by its tensor names."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return "vae" in path.name.lower()  # an old pickled file: its name has to do
    bare = {name.removeprefix(VAE).removeprefix("vae.") for name in names}
    return "decoder.conv_in.weight" in bare and not any(name.startswith(UNET) for name in names)


def is_clip(path: Path) -> bool:
    """Whether a file holds a CLIP text encoder and no whole model, by its tensor names."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return False
    tokens = ("embeddings.token_embedding.weight", "token_embedding.weight")
    return any(name.endswith(tokens) for name in names) and not any(name.startswith(UNET) for name in names)


def _plainly(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
