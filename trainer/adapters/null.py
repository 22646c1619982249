"""Null-LoRA (2512.15233), cross-frozen: each half of the rank trains one factor, and one is frozen in a null space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.subspace import is_orthonormal, least_columns, least_rows
from ..maths.weights import weight_matrix
from ..params.spaces import NULL_RULES, NullParams
from .base import ADAPTERS, AdapterSpec, Groups, Strength
from .bases import Pair, SvdParams, blank, weight_bases
from .factored import LOST, Factored

MOST_HELD = 1024


@ADAPTERS.register("null", "null_lora", "nulllora")
class Null(Factored):
    """ΔW = (alpha/rank)·(B·N_v + N_u·A), the rows of N_v and columns of N_u orthonormal and frozen, A and B from 0.

    It starts as the bare model, both halves get a gradient in the first step, and the model is linear in A and B. The
    paper's learned balance of the halves is left out for that. With network_null_space activations N_v lies where
    ordinary inputs do not reach, and A is kept out of the directions that they use most (2503.02659).
    """

    help = "Trains half the parameters of a LoRA of this rank, in directions the model hardly uses. Saved as a LoRA."
    needs = frozenset({"null", "svd"})
    sections = (NullParams, SvdParams)
    rules = NULL_RULES
    factors: ClassVar[Groups] = (("up", "down"),)
    ups: ClassVar[tuple[str, ...]] = ("up",)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        rows, columns = halves(self.key, self.rank, self.fan_in, self.fan_out)
        frozen_down, frozen_up = cast("dict[str, Pair]", spec.shared)[layer.key]
        self.up = nn.Parameter(torch.zeros(self.fan_out, rows))
        self.down = nn.Parameter(torch.zeros(columns, *self.kernel))
        self.frozen_down: Tensor
        self.frozen_up: Tensor
        self.held: Tensor
        self.register_buffer("frozen_down", frozen_down.view(rows, *self.kernel))
        self.register_buffer("frozen_up", frozen_up)
        confined = spec[NullParams].network_null_space == "activations"
        held = min(self.fan_in // 2, MOST_HELD, self.fan_in - rows) if confined else 0
        self.register_buffer("held", torch.zeros(held, self.fan_in))

    @classmethod
    def shared(cls, layers: Sequence[Layer], spec: AdapterSpec, tell: Callable[[str], None]) -> object:
        counts = {}
        for layer in layers:
            fan_out, fan_in = weight_matrix(layer.module)
            counts[layer.key] = halves(layer.key, spec.rank_of(layer.kind, layer.block), fan_in, fan_out)
        if spec.restored:
            return blank(layers, counts)
        return weight_bases(layers, counts, _least, "null", spec[SvdParams].svd_cache_path, tell, spec.device)

    def product(self) -> tuple[Tensor, Tensor]:
        down: Tensor = self.down
        if len(self.held):
            flat = down.flatten(1).to(torch.promote_types(down.dtype, self.held.dtype))
            held = self.held.to(flat.dtype)
            down = (flat - (flat @ held.T) @ held).view(down.shape)
        return torch.cat([self.frozen_down, down]), torch.cat([self.up, self.frozen_up], dim=1)

    @torch.no_grad()
    def calibrate(self, inputs: Tensor) -> bool:
        """Freeze N_v where the inputs (n, in) have least energy, and keep A out of where they have most.

        Not where something is learned already, which would change; returns whether it was done.
        """
        if self.up.any() or self.down.any():
            return False
        right = torch.linalg.svd(inputs.float(), full_matrices=False).Vh
        rows, top = len(self.frozen_down), right[: len(self.held)]
        least = right[-rows:] if len(right) == self.fan_in else least_rows(right, rows)
        self.held[: len(top)].copy_(top)
        self.frozen_down.copy_(least.reshape(self.frozen_down.shape))
        return True

    def fit(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The same ΔW in the present null space, or else the halves that the file itself brings."""
        rows, columns, held = (buffer.float().cpu() for buffer in (self.frozen_down, self.frozen_up, self.held))
        rows = rows.flatten(1)
        own_up = up @ (down @ rows.T)
        own_down = (columns.T @ up) @ (down - (down @ rows.T) @ rows)
        own_down = own_down - (own_down @ held.T) @ held
        if self.lost(down, up, torch.cat([rows, own_down]), torch.cat([own_up, columns], dim=1)) <= LOST:
            return {"up": own_up, "down": own_down.view(self.down.shape)}
        count = len(rows)
        long, wide = down[:count].norm(dim=1), up[:, count:].norm(dim=0)
        if len(down) == self.rank and float(long.min()) > 0 and float(wide.min()) > 0:
            rows, columns = down[:count] / long[:, None], up[:, count:] / wide
            if is_orthonormal(rows) and is_orthonormal(columns.T):
                own_down = down[count:] * wide[:, None]
                values = {"up": up[:, :count] * long, "down": own_down, "frozen_down": rows, "frozen_up": columns}
                shapes = {"down": self.down.shape, "frozen_down": self.frozen_down.shape}
                return {name: value.view(shapes.get(name, value.shape)) for name, value in values.items()}
        raise AdapterError(
            f"{self.key}: what the file has learned lies outside the null space of this layer, so network_type null"
            " cannot go on with it. Choose network_type lierla."
        )


def halves(key: str, rank: int, fan_in: int, fan_out: int) -> tuple[int, int]:
    """(rows of N_v, columns of N_u) of a layer. Raises AdapterError when the rank has no two halves or is too large."""
    rows, columns = rank - rank // 2, rank // 2
    if columns and rows <= fan_in and columns <= fan_out:
        return rows, columns
    most = 2 * min(fan_in, fan_out)
    raise AdapterError(f"{key}: network_type null needs a rank from 2 to {most} in this layer, and got {rank}.")


def _least(weight: Tensor, rows: int, columns: int) -> Pair:
    """N_v and N_u of a weight (out, in)."""
    fan_out, fan_in = weight.shape
    down = least_rows(weight, rows)
    if fan_in != fan_out or columns > rows:
        return down, least_columns(weight, columns)
    product = weight.float() @ down[:columns].T  # the left singular vectors, without a second decomposition
    if float(product.norm(dim=0).min()) <= 1e-6 * float(weight.float().norm()):
        return down, least_columns(weight, columns)
    return down, torch.linalg.qr(product).Q
