"""All trainable tensors and their gradients as views of one flat buffer per dtype.

One kernel then does what would be hundreds: clear, norm, clip, mask, cast, all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class FlatParameters:
    """Owns flat storage for the trained parameters of a network and their gradients; the parameters stay ordinary
    `nn.Parameter`s with views as data.

    Parameters in half precision have float32 masters. Forward and backward see the half values; the optimizer, clipping
    and everything that is written see the masters: AdamW's steps are smaller than what fp16 or bf16 resolve, and its
    moments are below what fp16 holds. `values` are the buffers that the forward reads, `masters` those that the
    optimizer changes, `gradients` the masters' gradients, `trained` the
    optimizer's parameters. Without half precision values and masters are the same.
    """

    def __init__(self, network: nn.Module) -> None:
        self.values: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._halves: list[tuple[Tensor, Tensor]] = []  # value buffer and gradient buffer in half precision
        self._before: list[Tensor] = []
        twins: dict[nn.Parameter, nn.Parameter] = {}
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in network.parameters():
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for dtype, group in by_dtype.items():
            flat = torch.cat([p.detach().reshape(-1) for p in group])
            gradient = _spread(flat, group)
            self.values.append(flat)
            if dtype in HALF:
                self._halves.append((flat, gradient))
                flat = flat.float()
                copies = [nn.Parameter(p.detach().float()) for p in group]
                gradient = _spread(flat, copies)
                twins.update(zip(group, copies, strict=True))
            self.masters.append(flat)
            self.gradients.append(gradient)
        self.trained = [twins.get(p, p) for p in network.parameters() if p.requires_grad]
        self._places = [
            (module._parameters, name, parameter, twins[parameter])
            for module in network.modules()
            for name, parameter in module._parameters.items()
            if parameter in twins
        ]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside the block the network holds the float32 masters in place of its half parameters."""
        for held, name, _, twin in self._places:
            held[name] = twin
        try:
            yield
        finally:
            for held, name, parameter, _ in self._places:
                held[name] = parameter

    @torch.no_grad()
    def adopt(self) -> None:
        """Take over what was written into the network's parameters."""
        for (half, _), master in zip(self._halves, self._wide(self.masters), strict=True):
            master.copy_(half)

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the masters into the network, rounded; one kernel."""
        for (half, _), master in zip(self._halves, self._wide(self.masters), strict=True):
            half.copy_(master)

    def collect(self) -> None:
        """Add what a backward pass left in half gradients to those of the masters; call it after each backward."""
        for (_, gradient), wide in zip(self._halves, self._wide(self.gradients), strict=True):
            wide.add_(gradient)
            gradient.zero_()

    def _wide(self, buffers: list[Tensor]) -> list[Tensor]:
        """Those of the buffers that belong to parameters in half precision."""
        return [buffer for buffer, value in zip(buffers, self.values, strict=True) if value.dtype in HALF]

    @property
    def own_bytes(self) -> int:
        """Bytes of what is kept beside the network's own tensors: gradients and masters."""
        masters = [master for master, value in zip(self.masters, self.values, strict=True) if master is not value]
        kept = [*self.gradients, *masters, *(gradient for _, gradient in self._halves)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def zero_gradients(self) -> None:
        """Set all gradients to 0, keeping the buffers."""
        for gradient in self.gradients:
            gradient.zero_()
        for _, gradient in self._halves:
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
            gradient.mul_(factor.to(gradient.dtype)).masked_fill_(~finite, 0)
        return finite

    def remember(self) -> None:
        """Keep the present values for `undo_unless`."""
        self._before = self._before or [torch.empty_like(flat) for flat in self.masters]
        for before, now in zip(self._before, self.masters, strict=True):
            before.copy_(now)

    def undo_unless(self, finite: Tensor) -> None:
        """Put the remembered values back where `finite` is false, on the device."""
        for before, now in zip(self._before, self.masters, strict=True):
            now.copy_(torch.where(finite, now, before))


def _spread(flat: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Make parameters views of a flat buffer, and their gradients views of another one, which is returned."""
    gradient = torch.zeros_like(flat)
    start = 0
    for p in parameters:
        end = start + p.numel()
        p.data = flat[start:end].view(p.shape)
        p.grad = gradient[start:end].view(p.shape)
        start = end
    return gradient
