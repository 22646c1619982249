"""Dynamic loss scaling for float16 (Micikevicius et al. 1710.03740, section 3.2).

The rules and numbers of torch's GradScaler, with three differences: nothing of it is float64 (Apple's devices have
none), it works in every torch that WebUIs pin and on every device, and it acts on the flat buffers that hold all
gradients, so that it is a few kernels whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

START, LARGEST = 2.0**16, 2.0**40
GROWTH_INTERVAL = 2000
"""Finite steps in a row after which the scale is doubled; a step that is not finite halves it."""


def takes_mask(optimizer: Optimizer) -> bool:
    """Whether an optimizer can decide on the device that a step is left out.

    Fused ones can on a CPU and on CUDA; torch's for Apple's devices and Intel's take the flag and do not look at it.
    """
    known = all(p.device.type in ("cpu", "cuda") for group in optimizer.param_groups for p in group["params"][:1])
    return known and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def masked_step(optimizer: Optimizer, finite: Tensor) -> None:
    """A step of an optimizer that `takes_mask`, which changes nothing where `finite` (0-d bool) is false."""
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


class LossScaler:
    """Scales a loss before its backward pass, and skips optimizer steps whose gradients overflowed.

    `gradients`: the buffers that the optimizer's gradients are views of. Not enabled, it changes nothing.
    """

    def __init__(self, gradients: Sequence[Tensor], enabled: bool) -> None:
        self._gradients, self._enabled = gradients, enabled and bool(gradients)
        device = gradients[0].device if gradients else None
        self._scale = torch.full((), START, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.float32, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def is_enabled(self) -> bool:
        """Whether losses are scaled at all."""
        return self._enabled

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self._scale if self._enabled else loss

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale and note whether all of them are finite. Nothing is read."""
        if self._enabled:
            inverse = 1.0 / self._scale  # a power of two: exact
            for gradient in self._gradients:
                gradient.mul_(inverse)
            self._finite = torch.isfinite(torch.stack([gradient.norm() for gradient in self._gradients])).all()

    def step(self, optimizer: Optimizer) -> None:
        """An optimizer step, unless a gradient overflowed. Fused optimizers decide that on the device; for others the
        device is asked.
        """
        if not self._enabled:
            optimizer.step()
        elif takes_mask(optimizer):
            masked_step(optimizer, self._finite)
        elif bool(self._finite):
            optimizer.step()

    def update(self) -> None:
        """Set the scale for the next step."""
        if self._enabled:
            self._good = torch.where(self._finite, self._good + 1, 0.0)
            grown = self._good >= GROWTH_INTERVAL
            factor = torch.where(self._finite, torch.where(grown, 2.0, 1.0), 0.5)
            self._scale = (self._scale * factor).clamp_max(LARGEST)
            self._good = torch.where(grown, 0.0, self._good)

    def get_scale(self) -> float:
        """The scale as a number; reads the device."""
        return float(self._scale) if self._enabled else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as plain numbers; reads the device."""
        if not self._enabled:
            return {}
        return {"scale": float(self._scale), "_growth_tracker": int(self._good)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of this class or of torch's GradScaler; an empty one is of a scaler that was off."""
        if self._enabled and state:
            self._scale.fill_(state["scale"])
            self._good.fill_(state["_growth_tracker"])
