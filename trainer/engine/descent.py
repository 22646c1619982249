"""Optimizer steps on the adapter before the training itself, for stages that train it towards something first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maths.scaling import LossScaler
from .flat import FlatParameters


class Descent:
    """AdamW without weight decay on the masters of `flat`; a call takes one step down a loss (0-d).

    `scaled`: whether losses are scaled for float16.
    """

    def __init__(self, flat: FlatParameters, scaled: bool, rate: float) -> None:
        flat.adopt()
        self._flat, self._scaler = flat, LossScaler(flat.gradients, scaled)
        self._optimizer = torch.optim.AdamW(flat.trained, lr=rate, weight_decay=0.0)

    def __call__(self, loss: Tensor) -> None:
        """One step."""
        self._flat.zero_gradients()
        self._scaler.scale(loss).backward()
        self._flat.collect()
        self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._flat.publish()
