"""How much a model's prediction depends on each weight: the diagonal of JᵀJ, kept as one number per row and column.

For a prediction of n numbers with Jacobian J in a weight matrix W (out, in), F = (2/n)·E[(Jᵀξ)²] with E[ξξᵀ] = 1: then
½·Σ F·ΔW² is, without its mixed terms, the mean square by which ΔW changes the prediction. F is the diagonal of the
Gauss–Newton matrix of the mean squared error, and up to a factor of the Fisher information of a normal distribution
around the prediction (Martens 1412.1193, sections 8 and 9). Only F ≈ row ⊗ column is kept, with the exact sums of rows
and columns, the best such product in the sense of Adafactor (1804.04235, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .functions import applied
from .weights import weight_matrix


class _Listening(torch.autograd.Function):
    """Hands the gradient of a layer's output to `hear`, and makes a backward pass reach the layer at all."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, token: Tensor, hear: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.hear = hear
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.hear(ctx.saved_tensors[0], grad)
        return grad, None, None, None


Sums = tuple[dict[str, Tensor], dict[str, Tensor]]


class Curvature:
    """Sums of squared gradients of weights by row and by column, collected from backward passes of single samples."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self.rows = {key: torch.zeros(weight_matrix(layer)[0]) for key, layer in layers.items()}
        self.columns = {key: torch.zeros(weight_matrix(layer)[1]) for key, layer in layers.items()}
        self.samples = 0

    @contextmanager
    def listening(self, scale: float = 1.0) -> Iterator[None]:
        """Inside the block every backward pass adds the squares of its gradients, undoing a factor `scale` of them."""
        hooks = [layer.register_forward_hook(self._hook(key, scale)) for key, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, key: str, scale: float) -> Any:
        def hear(x: Tensor, grad: Tensor) -> None:
            for x_one, grad_one in zip(x, grad, strict=True):
                square = (_weight_gradient(self._layers[key], x_one.float(), grad_one.float()) / scale).square()
                self.rows[key] += square.sum(1).cpu()
                self.columns[key] += square.sum(0).cpu()

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            token = torch.zeros((), device=output.device, requires_grad=True)
            return applied(_Listening, output, inputs[0].detach(), token, hear)

        return hook

    def sums(self) -> Sums:
        """The sums as they stand, to go back to with `reset`."""
        return (
            {key: rows.clone() for key, rows in self.rows.items()},
            {key: columns.clone() for key, columns in self.columns.items()},
        )

    def reset(self, sums: Sums) -> None:
        """Forget what came after `sums` were taken."""
        self.rows, self.columns = sums

    def overflowed(self) -> str:
        """The key of the first layer with a sum that is not finite, "" when all are."""
        return next((key for key, rows in self.rows.items() if not bool(torch.isfinite(rows).all())), "")

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(out, in) factors per layer, F_ij ≈ out_i·in_j, the mean over the samples."""
        found = {}
        for key, rows in self.rows.items():
            whole = float(rows.sum())
            if whole > 0 and self.samples:
                found[key] = rows / self.samples, self.columns[key] / whole
        return found


def _weight_gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a linear or convolutional layer's weight for one sample, (out, in·k·k)."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            raise ValueError(f"padding {layer.padding!r}: only numbers are known")
        rows = functional.unfold(x[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return grad.flatten(1) @ rows[0].T
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def probe(prediction: Tensor, residual: Tensor | None, generator: torch.Generator) -> Tensor:
    """What is to be multiplied with J: √(2/n)·ξ, ξ of random signs, or the residual brought to a mean square of 1."""
    count = prediction.numel()
    if residual is None:
        signs: Tensor = torch.randint(0, 2, prediction.shape, generator=generator) * 2.0 - 1.0
    else:
        signs = residual / residual.square().mean().sqrt().clamp(min=1e-12)
    return signs.to(prediction).mul((2 / count) ** 0.5)


def weighted_square(down: Tensor, up: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Σ_ij row_i·column_j·(U·D)²_ij for stacks D (…, r, in), U (…, out, r), without the product: (…,)."""
    left = up.transpose(-1, -2) @ (rows[..., :, None] * up)
    right = (down * columns[..., None, :]) @ down.transpose(-1, -2)
    return (left * right).sum(dim=(-1, -2))
