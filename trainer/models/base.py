"""A loaded base model: UNet, text encoders, VAE and noise process behind the few verbs that training needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..maths.process import NoiseProcess
from . import precision
from .family import Family
from .recompute import Around, recompute
from .room import same_device
from .text import TextEncoder


@dataclass(frozen=True)
class Conditioning:
    """What the UNet needs of texts: one row a prompt. `pooled_BP` is SDXL's."""

    context_BLD: Tensor
    pooled_BP: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_BLD)

    def __getitem__(self, rows: Any) -> Conditioning:
        """Some rows: a slice or an index tensor or list (one integer keeps the batch axis)."""
        picked = [rows] if isinstance(rows, int) else rows
        return Conditioning(self.context_BLD[picked], None if self.pooled_BP is None else self.pooled_BP[picked])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another precision."""
        moved = None if self.pooled_BP is None else self.pooled_BP.to(device=device, dtype=dtype)
        return Conditioning(self.context_BLD.to(device=device, dtype=dtype), moved)

    def expand(self, n: int) -> Conditioning:
        """One row repeated n times, as a view."""
        pooled = None if self.pooled_BP is None else self.pooled_BP.expand(n, -1)
        return Conditioning(self.context_BLD.expand(n, -1, -1), pooled)

    def detach(self) -> Conditioning:
        """The same without its gradient graph."""
        return Conditioning(self.context_BLD.detach(), None if self.pooled_BP is None else self.pooled_BP.detach())

    @staticmethod
    def cat(rows: Sequence[Conditioning]) -> Conditioning:
        """All rows in one batch. Raises ValueError when the token counts differ: encode such prompts in one call."""
        if len({row.context_BLD.shape[1] for row in rows}) != 1:
            lengths = sorted({row.context_BLD.shape[1] for row in rows})
            raise ValueError(f"prompts of {lengths} tokens cannot share a batch; encode them together")
        pooled = [row.pooled_BP for row in rows if row.pooled_BP is not None]
        return Conditioning(torch.cat([row.context_BLD for row in rows]), torch.cat(pooled) if pooled else None)


class Model:
    """A base model. Its parts are plain attributes; all of them are frozen and in evaluation mode when loaded.

    `family` is its architecture row (with `base_version` as it stands in LoRA files), `name` the file's base name,
    `process` the noise process with the prediction type, `warnings` what the user should be told. `device` is the one
    to compute on (None: where the UNet is). The parts may rest elsewhere: whoever uses one brings it there first.
    """

    def __init__(
        self,
        family: Family,
        name: str,
        unet: Any,
        text_encoders: Sequence[TextEncoder],
        vae: Any | None,
        process: NoiseProcess,
        *,
        path: Path | None = None,
        warnings: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.family, self.name, self.path = family, name, path
        self.unet, self.text_encoders, self.vae = unet, tuple(text_encoders), vae
        self.process: NoiseProcess = process
        self.latent_scale = family.latent_scale
        self.warnings = tuple(warnings)
        self.latent_channels: int = unet.config.in_channels
        self.latent_factor: int = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.window: int = min(encoder.window for encoder in self.text_encoders)
        self.device = unet.conv_in.weight.device if device is None else device
        self.storage = main_dtype(unet)
        self._compute: torch.dtype | None = None
        self._hash: str | None = None
        self._home: dict[nn.Parameter, Tensor] = {}
        self._settle()

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """UNet, text encoders and, where there is one, the VAE."""
        return (self.unet, *self.text_encoders, *(() if self.vae is None else (self.vae,)))

    @property
    def gates(self) -> list[nn.Module]:
        """The first layers of the UNet's gated feed-forward blocks, in the order of computation; the second half of
        what they give is the gate."""
        return [module.proj for module in self.unet.modules() if type(module).__name__ == "GEGLU"]

    @property
    def compute(self) -> torch.dtype:
        """The precision the UNet and the text encoders compute in."""
        return self._compute or precision.compute_dtype(self.device, self.storage)

    def set_precision(
        self, storage: torch.dtype | None = None, compute: torch.dtype | None = None, vae: torch.dtype | None = None
    ) -> None:
        """Store UNet and text encoders in `storage`, compute in `compute`; None keeps the storage, or lets the device
        decide.

        The VAE computes in the precision it is stored in (`vae`), which on a CPU is always float32.
        """
        if storage is not None:
            for part in (self.unet, *self.text_encoders):
                nn.Module.to(part, storage)
            self.storage = storage
        if vae is not None and self.vae is not None:
            nn.Module.to(self.vae, vae)
        self._compute = compute
        self._settle()

    def to(self, device: torch.device | str) -> Model:
        """Move everything to a device; the compute precision follows unless it was set."""
        self.device = torch.device(device)
        for part in self.parts:
            self.bring(part)
        self._settle()
        return self

    def is_here(self, part: nn.Module) -> bool:
        """Whether all weights of a part are on the model's device."""
        return all(same_device(parameter.device, self.device) for parameter in part.parameters())

    def bring(self, part: nn.Module) -> None:
        """Put a part on the model's device."""
        nn.Module.to(part, self.device)

    def set_home(self, parts: Sequence[nn.Module], addresses: Collection[int]) -> None:
        """Remember where the weights of parts lie now, if their storage is among the addresses, as their place while
        they are not needed.
        """
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            if parameter.untyped_storage().data_ptr() in addresses:
                self._home[parameter] = parameter.data

    def go_home(self, part: nn.Module) -> None:
        """Take a part off the device: its weights to where they lay at first, or to memory when that was not
        remembered.
        """
        for parameter in part.parameters():  # buffers follow when the part is next moved
            if parameter in self._home:
                parameter.data = self._home[parameter]
            elif parameter.device.type not in ("cpu", "meta"):
                parameter.data = parameter.data.cpu()

    def rests_here(self, part: nn.Module) -> bool:
        """Whether a part's place while it is not needed is the model's device."""
        resting = (self._home.get(parameter) for parameter in part.parameters())
        return self.device.type == "cpu" or all(
            data is not None and same_device(data.device, self.device) for data in resting
        )

    def _settle(self) -> None:
        for part in (self.unet, *self.text_encoders):
            precision.install(part, self.compute)
        if (
            self.vae is not None
        ):  # its decoder casts to the precision of its own parameters, so per-call casts cannot serve it
            nn.Module.to(self.vae, precision.compute_dtype(self.device, main_dtype(self.vae)))

    def set_gradient_checkpointing(self, on: bool, around: Around | None = None) -> None:
        """Recompute the UNet's activations in the backward pass, block by block and each in what `around` gives."""
        recompute(self.unet, on, around)

    # ---------------------------------------------------------------- text

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt without start and end; of the first text encoder."""
        return len(self.text_encoders[0].tokenizer.encode(prompt))

    def chunk_count(self, prompt: str) -> int:
        """Windows a prompt fills, at least 1."""
        return max(1, math.ceil(self.token_count(prompt) / (self.window - 2)))

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 1, chunks: int = 1) -> Conditioning:
        """Conditioning of prompts, with gradients if the caller enabled them and the encoders' weights want them.

        A prompt longer than the window is split into chunks of window−2 tokens, each encoded on its own with start and
        end, and joined along the token axis; all rows get the same number of chunks. SDXL's pooled vector is of the
        first chunk. `clip_skip` 1 is the layer the model was trained on, 2 the penultimate (SDXL always uses at least
        the penultimate).
        """
        if not prompts:
            raise ValueError("encode_prompts needs at least one prompt")
        contexts, pooled = [], None
        for encoder in self.text_encoders:
            rows = [encoder.tokenizer.chunks(prompt, self.window) for prompt in prompts]
            most = max(chunks, *map(len, rows))
            empty = encoder.tokenizer.row([], self.window)
            flat = [chunk for row in rows for chunk in [*row, *([empty] * (most - len(row)))]]
            hidden, projected = encoder(torch.tensor(flat, device=self.device), clip_skip)
            contexts.append(hidden.reshape(len(prompts), most * self.window, -1))
            pooled = pooled if projected is None else projected[::most]
        longest = max(context.shape[1] for context in contexts)
        if any(context.shape[1] != longest for context in contexts):
            raise ModelError(
                "the two tokenizers split the prompt into different numbers of chunks; use one vocabulary for both."
            )
        return Conditioning(torch.cat(contexts, -1), pooled)

    # ---------------------------------------------------------------- pictures

    def _need_vae(self) -> Any:
        if self.vae is None:
            raise ModelError(f"{self.name}: this model file has no VAE; choose a VAE file beside it.")
        return self.vae

    @contextmanager
    def _tiles(self, edge: int) -> Iterator[Any]:
        """The VAE, which inside the block works on overlapping tiles of `edge` pixels that are blended; 0: on all."""
        vae = self._need_vae()
        names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
        before = {name: getattr(vae, name) for name in names}
        values = (True, edge, edge // self.latent_factor) if edge else (False, *list(before.values())[1:])
        try:
            for name, value in zip(names, values, strict=True):
                setattr(vae, name, value)
            yield vae
        finally:
            for name, value in before.items():
                setattr(vae, name, value)

    @torch.no_grad()
    def encode_images(self, pixels_BCHW: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of the latents of pictures in [−1, 1], scaled for the UNet, float32.

        With `tile` larger pictures are encoded in overlapping tiles of so many pixels: less memory, faint seams.
        """
        with self._tiles(tile) as vae:
            latents = vae.encode(pixels_BCHW.to(self.device, vae.dtype)).latent_dist
        return latents.mean.float() * self.latent_scale, latents.std.float() * self.latent_scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, tile: int = 0) -> Tensor:
        """Pictures (about [−1, 1], float32) of latents as the UNet sees them; for `tile` see `encode_images`."""
        unscaled = latents_BCHW.to(self.device, torch.float32) / self.latent_scale
        with self._tiles(tile) as vae:
            pixels: Tensor = vae.decode(unscaled.to(vae.dtype)).sample
        return pixels.float()

    # ---------------------------------------------------------------- prediction

    def predict(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning, time_ids_B6: Tensor | None = None) -> Tensor:
        """The UNet's prediction (ε or v, as `process` says) at x_t and times t (B,), float32. Raises ValueError when
        SDXL's sizes are missing."""
        added = None
        if self.family.sizes:
            if time_ids_B6 is None or cond.pooled_BP is None:
                raise ValueError(f"{self.family.label} needs time_ids and a pooled text")
            added = {
                "text_embeds": cond.pooled_BP.to(self.device, self.compute),
                "time_ids": time_ids_B6.to(self.device, torch.float32),
            }
        context = cond.context_BLD.to(self.device, self.compute)
        x = x_BCHW.to(self.device, self.compute)
        time = self.process.model_time(t_B.to(self.device))
        out: Tensor = self.unet(x, time, context, added_cond_kwargs=added, return_dict=False)[0]
        return out.float()

    def time_ids(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor | None:
        """SDXL's six numbers (6,) in pixels: original (height, width), crop (top, left), target (height, width); None
        for others."""
        return torch.tensor([*original, *crop, *target], dtype=torch.float32) if self.family.sizes else None

    # ---------------------------------------------------------------- identity

    def hash(self) -> str:
        """SHA-256 (hex) of the model file, or of the weight files of a folder in order of name; "" without a file."""
        if self._hash is None:
            self._hash = file_hash(self.path) if self.path is not None and self.path.exists() else ""
        return self._hash

    def short_hash(self) -> str:
        """The short hash that WebUIs had before: of 64 KiB at 1 MiB of the model file, 8 digits; "" for a folder."""
        if self.path is None or not self.path.is_file():
            return ""
        with self.path.open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]

    def known_hash(self, sha256: str) -> None:
        """Take over the file's SHA-256 (hex) from somebody who has computed it; "" is ignored."""
        self._hash = sha256.lower() or self._hash


def main_dtype(module: nn.Module) -> torch.dtype:
    """The precision in which most numbers of a module are stored."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file, or of all weight files below a folder in order of name."""
    weights = (".safetensors", ".bin")
    files = sorted(found for found in path.rglob("*") if found.suffix in weights) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
