"""Starts from the model itself: the adapter begins with factors of each weight, or of its first gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..maths import rng, starts
from ..maths.weights import weight_matrix, weight_of, weight_shape
from ..modes.base import Batch, Settings
from ..params.network import DIFFERENCE_INITS, NetworkOptions
from .base import STAGES, Preparation, Stage

_AT_ONCE = 2**27
"""Numbers of gradients that are held at the same time (512 MB)."""

_HALF_SCALE, _LEAST_SCALE = 2.0**12, 2.0**-12
"""What keeps the gradients of fp16 arithmetic above its smallest number, and how small it may become when they are
above its largest.
"""


@STAGES.register("start")
class Start(Stage):
    """PiSSA, MiLoRA, OLoRA and LoRA-GA. The base model stays as it is: the adapter counts from its start."""

    help = "Starts the adapter from the weights of the model or from the first gradient."

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        return settings[NetworkOptions].network_init in DIFFERENCE_INITS

    def prepare(self, at: Preparation) -> None:
        init = self.settings[NetworkOptions].network_init
        adapters = [adapter for adapter in at.network if init in adapter.inits]
        if at.resumed or not adapters:
            return
        began = time.perf_counter()
        if init == "lora_ga":
            found = _gradients(adapters, at)
        else:
            found = ((adapter, weight_of(adapter.module, torch.float32).detach().flatten(1)) for adapter in adapters)
        for adapter, matrix in found:
            adapter.start(*factors(init, matrix, adapter.rank, adapter.scale, rng.generator(init, adapter.key)))
        at.tell(f"network_init {init}: {len(adapters)} layers in {time.perf_counter() - began:.1f} s.")


def _gradients(adapters: list[Any], at: Preparation) -> Iterator[tuple[Any, Tensor]]:
    """Every layer's gradient for the first micro batch, as many layers in one backward pass as fit in memory."""
    first = next(found for index in range(64) if (found := at.batch(index)) is not None)
    scale = _HALF_SCALE if at.model.compute == torch.float16 else 1.0
    for group in _groups(adapters):
        gradients, overflowed = _scaled_gradients(group, at, first, scale)
        while overflowed and scale > _LEAST_SCALE:
            scale /= 16
            gradients, overflowed = _scaled_gradients(group, at, first, scale)
        if overflowed:
            raise TrainingError(
                f"network_init = lora_ga: the first gradient of {overflowed} is not finite. Train with"
                " train_model_precision bf16 or fp32, or choose another network_init."
            )
        yield from zip(group, gradients, strict=True)
    for parameter in (p for adapter in adapters for p in adapter.parameters() if p.grad is not None):
        parameter.grad.zero_()


def _scaled_gradients(group: list[Any], at: Preparation, batch: Batch, scale: float) -> tuple[list[Tensor], str]:
    """The gradients of the layers of some adapters; the key of the first whose gradient is not finite ("": none)."""
    found = weight_gradients([adapter.module for adapter in group], lambda: at.loss(batch), scale)
    broken = (one.key for one, gradient in zip(group, found, strict=True) if not torch.isfinite(gradient).all())
    return found, next(broken, "")


def factors(init: str, matrix: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down (r, in) and up (out, r) of a start; a rank beyond the matrix gets random rows below and zeros above."""
    if init == "pissa":
        down, up = starts.largest_directions(matrix, rank, scale, generator)
    elif init == "milora":
        down, up = starts.smallest_directions(matrix, rank, scale)
    elif init == "olora":
        down, up = starts.orthonormal_rows(matrix, rank)
    else:
        down, up = starts.first_gradient(matrix, rank, generator)
    lacking = rank - min(down.shape[0], up.shape[1])
    if lacking > 0:
        down, up = down[: rank - lacking], up[:, : rank - lacking]
        more = torch.randn(lacking, matrix.shape[1], generator=generator).to(matrix) / matrix.shape[1] ** 0.5
        down, up = torch.cat([down, more]), torch.cat([up, up.new_zeros(len(up), lacking)], 1)
    return down, up


def weight_gradients(modules: list[nn.Module], loss: Callable[[], Tensor], scale: float = 1.0) -> list[Tensor]:
    """The gradient of a loss (per sample, summed) with respect to the weight of frozen layers, (out, in·k·k) float32.

    From each layer's input and the gradient of its output, which must depend on something that is trained. The backward
    pass is that of the loss times `scale`.
    """
    found = [torch.zeros(weight_matrix(module), device=weight_of(module).device) for module in modules]
    hooks = [module.register_forward_hook(_watch(total)) for module, total in zip(modules, found, strict=True)]
    try:
        (loss().sum() * scale).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return [total / scale for total in found]


def _watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: _add(total, module, x, gradient))

    return look


def _add(total: Tensor, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    x, gradient = x.float(), gradient.detach().float()
    if isinstance(module, nn.Conv2d):
        geometry = (module.stride, module.padding, module.dilation)
        total += nn.grad.conv2d_weight(x, tuple(weight_shape(module)), gradient, *geometry).flatten(1)
    else:
        total += gradient.flatten(0, -2).T @ x.flatten(0, -2)


def _groups(adapters: list[Any]) -> Iterator[list[Any]]:
    group: list[Any] = []
    held = 0
    for adapter in adapters:
        size = math.prod(weight_shape(adapter.module))
        if group and held + size > _AT_ONCE:
            yield group
            group, held = [], 0
        group.append(adapter)
        held += size
    yield group
