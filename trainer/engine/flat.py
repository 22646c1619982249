"""All trainable tensors and their gradients as views of one flat buffer per dtype.

One kernel then does what would be hundreds: clear, norm, clip, mask, all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatParameters:
    """Owns flat storage for parameters and gradients; the parameters stay ordinary `nn.Parameter`s with views as
    data.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.values: list[Tensor] = []
        self.gradients: list[Tensor] = []
        for group in by_dtype.values():
            flat = torch.cat([p.detach().reshape(-1) for p in group])
            gradient = torch.zeros_like(flat)
            start = 0
            for p in group:
                end = start + p.numel()
                p.data = flat[start:end].view(p.shape)
                p.grad = gradient[start:end].view(p.shape)
                start = end
            self.values.append(flat)
            self.gradients.append(gradient)
        self._before = [torch.empty_like(flat) for flat in self.values]

    def zero_gradients(self) -> None:
        """Set all gradients to 0, keeping the buffers."""
        for gradient in self.gradients:
            gradient.zero_()

    def guard(self, loss: Tensor, max_norm: float) -> Tensor:
        """Clip to `max_norm` (0 = off) and clear everything when loss or norm is not finite. Returns that finiteness,
        0-d bool.

        Nothing is read from the device.
        """
        norm = torch.stack([g.float().norm() for g in self.gradients]).norm()
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        factor = (max_norm / (norm + 1e-6)).clamp_max(1.0) if max_norm else torch.ones_like(norm)
        for gradient in self.gradients:
            gradient.copy_(torch.where(finite, gradient * factor.to(gradient.dtype), torch.zeros_like(gradient)))
        return finite

    def remember(self) -> None:
        """Keep the present values for `undo_unless`."""
        for before, now in zip(self._before, self.values, strict=True):
            before.copy_(now)

    def undo_unless(self, finite: Tensor) -> None:
        """Put the remembered values back where `finite` is false, on the device."""
        for before, now in zip(self._before, self.values, strict=True):
            now.copy_(torch.where(finite, now, before))
