"""Which part of a model is on the device when, and how to recognise its weights again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..events import Event, EventLog, Step
from ..models.base import Model

_SAMPLED = 4096


def move(module: nn.Module | None, device: torch.device) -> None:
    """Move a part when it is not there yet."""
    if module is not None and place(module) != device:
        module.to(device)


@contextmanager
def encoding(model: Model) -> Iterator[None]:
    """VAE and text encoders are on the model's device inside the block; the VAE, and what came for the block, leave it
    afterwards.
    """
    came = [encoder for encoder in model.text_encoders if place(encoder) != model.device]
    for part in (model.vae, *model.text_encoders):
        move(part, model.device)
    try:
        yield
    finally:
        for part in (model.vae, *came):
            if part is not None:
                model.go_home(part)


def place(module: nn.Module) -> torch.device:
    """The device a part is on."""
    return next(module.parameters()).device


def rest_text_encoders(model: Model) -> None:
    """Text encoders that are not trained leave the device."""
    for encoder in model.text_encoders:
        model.go_home(encoder)


def wake_text_encoders(model: Model) -> None:
    """Text encoders that are trained are on the device."""
    for encoder in model.text_encoders:
        move(encoder, model.device)


def fingerprint(*modules: nn.Module | None) -> str:
    """Identifies weights, precision included, by names, shapes, sums and an even sample of each tensor's values."""
    digest = hashlib.sha256()
    for module in modules:
        if module is None:
            continue
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
            digest.update(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} {float(flat.sum(dtype=torch.float64))!r}".encode()
            )
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


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
