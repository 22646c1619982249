"""Which part of a model is on the device when, and how to recognise its weights again.

A run has phases, and each has only the parts on the device that it uses: the VAE while pictures are encoded, the text
encoders while texts are, then the UNet. A text encoder that is trained stays beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..events import Event, EventLog, Step
from ..maths.precise import has_float64
from ..models.base import Model
from ..models.room import empty_caches, is_shortage, let_go

_SAMPLED = 4096
P = ParamSpec("P")
R = TypeVar("R")


def settle(model: Model, *parts: nn.Module | None) -> None:
    """These parts are on the model's device, and no other of it; what is not needed leaves before they come."""
    wanted = {id(part) for part in parts}
    for part in model.parts:
        if id(part) not in wanted:
            model.go_home(part)
    empty_caches()
    for part in parts:
        if part is not None:
            model.bring(part)


@contextmanager
def using(model: Model, *parts: nn.Module | None) -> Iterator[None]:
    """These parts alone are on the model's device inside the block; afterwards every part is where it was.

    Where they are there already, nothing is moved.
    """
    if all(part is None or model.is_here(part) for part in parts):
        yield
        return
    before = [part for part in model.parts if model.is_here(part)]
    try:
        settle(model, *parts)
        yield
    except BaseException as error:
        let_go(error)  # what the block was computing makes room for what comes back
        raise
    finally:
        settle(model, *before)


class Visit(Generic[P, R]):
    """`work` as a function that brings the parts it needs to the model's device (see `using`).

    In a `with` block they come at the first call and stay until its end: who finds everything in a cache moves nothing.
    """

    def __init__(self, model: Model, parts: Sequence[nn.Module | None], work: Callable[P, R]) -> None:
        self._model, self._parts, self._work = model, tuple(parts), work
        self._stay: ExitStack | None = None
        self._came = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._stay is None:
            with using(self._model, *self._parts):
                return self._work(*args, **kwargs)
        if not self._came:
            self._stay.enter_context(using(self._model, *self._parts))
            self._came = True
        return self._work(*args, **kwargs)

    def __enter__(self) -> Visit[P, R]:
        self._stay, self._came = ExitStack(), False
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stay, self._stay = self._stay, None
        if stay is not None:
            stay.__exit__(kind, error, trace)


TILE = 512
"""Edge in pixels of the tiles in which a VAE works where a whole picture takes too much memory."""
WHOLE = 1536 * 1024
"""Pixels of the largest picture that is decoded as a whole elsewhere than in main memory (4.5 GiB in float32)."""


def picture_encoder(model: Model, log: EventLog) -> Visit[[Tensor], tuple[Tensor, Tensor]]:
    """`model.encode_images` with the VAE on the device; pictures that do not fit there are encoded in tiles."""
    told: set[tuple[int, ...]] = set()

    def encode(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return model.encode_images(pixels_BCHW)
        except Exception as error:
            if model.device.type == "cpu" or not is_shortage(error):
                raise
            let_go(error)
        empty_caches()
        found = model.encode_images(pixels_BCHW, TILE)
        height, width = pixels_BCHW.shape[-2:]
        if (height, width) not in told:
            told.add((height, width))
            log.warn(f"{width}x{height} does not fit on the device as a whole: encoded in tiles of {TILE} pixels.")
        return found

    return Visit(model, [model.vae], encode)


def decode(model: Model, latents_BCHW: Tensor) -> Tensor:
    """`model.decode`, in tiles where a picture is large or does not fit on the device; the VAE is there already."""
    height, width = (edge * model.latent_factor for edge in latents_BCHW.shape[-2:])
    if model.device.type == "cpu":
        return model.decode(latents_BCHW)
    try:
        return model.decode(latents_BCHW, TILE if height * width > WHOLE else 0)
    except Exception as error:
        if not is_shortage(error):
            raise
        let_go(error)
    empty_caches()
    return model.decode(latents_BCHW, TILE)


def fingerprint(*modules: nn.Module | None) -> str:
    """Identifies weights, precision included, by names, shapes and the bits of each tensor: their sum as whole numbers,
    and an even sample of them. The same on every device: no sum of floating-point numbers depends on its order.
    """
    digest = hashlib.sha256()
    for module in modules:
        if module is None:
            continue
        for name, tensor in module.state_dict().items():
            here = tensor.detach() if has_float64(tensor.device) else tensor.detach().cpu()  # nor may it add up int64
            flat = here.contiguous().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum(flat.view(torch.uint8))}".encode())
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def _sum(bits: Tensor) -> int:
    """The sum of bytes (N,) taken eight at a time, modulo 2^64: many times faster than adding numbers one by one."""
    words = bits[: bits.numel() // 8 * 8]
    rest = bits[words.numel() :]
    if words.storage_offset() % 8:  # a view of larger numbers has to begin at one
        words = words.clone()
    return int(words.view(torch.int64).sum()) + int.from_bytes(rest.cpu().numpy().tobytes(), "little")


class SpillWatch:
    """A listener that warns once when a CUDA device is so full that its driver starts to use system memory."""

    FULL = 0.97

    def __init__(self, device: torch.device, log: EventLog) -> None:
        self._device, self._log = device, log
        self._told = device.type != "cuda"

    def __call__(self, event: Event) -> None:
        """Look at the device when losses are read."""
        if self._told or not isinstance(event, Step):
            return
        free, total = torch.cuda.mem_get_info(self._device)
        if torch.cuda.memory_reserved(self._device) > self.FULL * total or free < (1 - self.FULL) * total:
            self._told = True
            self._log.warn(
                f"The GPU memory is full ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GB). "
                "The driver may move data to system memory, which makes every step many times slower. Switch on "
                "use_gradient_checkpointing, lower train_batch_size or image_size, or close other programs that use "
                "the GPU."
            )

    def close(self) -> None:
        """Nothing to close."""
