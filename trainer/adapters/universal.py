"""Universal LoRA (2512.05117): only a small core between two fixed bases is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.subspace import product_svd, truncated_svd
from ..maths.weights import weight_matrix
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from ..paths import expanded, is_file
from .base import ADAPTERS, AdapterSpec, Groups, Strength
from .bases import Pair, SvdParams, blank, weight_bases
from .basis_file import Basis, read_basis
from .dora import DoraOptions
from .factored import LOST, Factored


@dataclass(frozen=True)
class UniversalParams:
    """What Universal LoRA adds to the table."""

    basis_path: str = param(
        "",
        "File of bases, made by the basis command from a folder of LoRAs. Empty takes the main directions of the"
        " model's own weights.",
        "option",
        needs="universal",
        holds="file",
    )
    network_basis_mean: bool = param(
        False,
        "Start at the mean of the LoRAs that the bases were made from, instead of at the base model.",
        "option",
        needs="universal",
    )


def basis_there(job: Job, mode: ModeInfo) -> str:
    """A file of bases that is not there."""
    given = job[UniversalParams].basis_path.strip()
    if not given or is_file(expanded(given)):
        return ""
    return "there is no such file; write its path, or leave it empty to use the model's own directions."


def mean_of_something(job: Job, mode: ModeInfo) -> str:
    """The mean of no collection."""
    own = job[UniversalParams]
    if own.basis_path.strip() or not own.network_basis_mean:
        return ""
    return "needs a basis_path: without a collection of LoRAs there is no mean to start from."


@ADAPTERS.register("universal", "universal_lora")
class Universal(Factored):
    """ΔW = (alpha/rank)·U_b·P·D_b with frozen orthonormal U_b (out, k) and D_b (k, in), k = rank; P (k, k) from 0."""

    help = (
        "Trains a small square per layer between two fixed bases: few parameters, strongly regularised. Saved as a"
        " LoRA."
    )
    needs = frozenset({"dora", "universal", "svd"})
    sections = (UniversalParams, SvdParams, DoraOptions)
    rules = (
        Rule(("basis_path",), basis_there, complete=True),
        Rule(("network_basis_mean", "basis_path"), mean_of_something),
    )
    factors: ClassVar[Groups] = (("core",),)

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        basis: Basis = cast("dict[str, Basis]", spec.shared)[layer.key]
        self.frozen_down: Tensor
        self.frozen_up: Tensor
        self.register_buffer("frozen_down", basis.down.view(self.rank, *self.kernel))
        self.register_buffer("frozen_up", basis.up)
        start = basis.mean / self.scale if spec[UniversalParams].network_basis_mean else torch.zeros_like(basis.mean)
        self.core = nn.Parameter(start.contiguous())
        self._given = bool(spec[UniversalParams].basis_path.strip())

    @classmethod
    def shared(cls, layers: Sequence[Layer], spec: AdapterSpec, tell: Callable[[str], None]) -> object:
        ranks = {layer.key: spec.rank_of(layer.kind, layer.block) for layer in layers}
        for layer in layers:
            most = min(weight_matrix(layer.module))
            if ranks[layer.key] > most:
                raise AdapterError(
                    f"{layer.key}: network_type universal needs a rank of at most {most} in this layer, and got"
                    f" {ranks[layer.key]}."
                )
        if spec.restored:
            pairs = blank(layers, {key: (rank, rank) for key, rank in ranks.items()})
            return {key: _filled(None, pair, ranks[key]) for key, pair in pairs.items()}
        path = spec[UniversalParams].basis_path.strip()
        given = read_basis(path, layers) if path else {}
        short = [layer for layer in layers if layer.key not in given or len(given[layer.key].down) < ranks[layer.key]]
        counts = {layer.key: (ranks[layer.key],) * 2 for layer in short}
        own = weight_bases(short, counts, _main, "main", spec[SvdParams].svd_cache_path, tell, spec.device)
        if path:
            tell(
                f"{Path(path).name} has bases for {len(given)} of {len(layers)} layers; {len(short)} layers get"
                " directions of the model's own, in addition or alone."
            )
        return {layer.key: _filled(given.get(layer.key), own.get(layer.key), ranks[layer.key]) for layer in layers}

    def product(self) -> tuple[Tensor, Tensor]:
        core = self.core  # a float32 master has the bases in half precision around it
        return self.frozen_down, self.frozen_up.to(core.dtype) @ core

    def fit(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The same ΔW in the present bases, or, where the user gave none, the bases that the file itself spans."""
        rows, columns = (buffer.float().cpu().flatten(1) for buffer in (self.frozen_down, self.frozen_up))
        core = (columns.T @ up) @ (down @ rows.T)
        lost = self.lost(down, up, rows, columns @ core)
        if lost <= LOST:
            return {"core": core}
        u, s, v = product_svd(down, up)
        if self._given or float(s[self.rank :].norm()) > LOST * float(s.norm()):
            raise AdapterError(
                f"{self.key}: {lost:.0%} of what the file has learned lies outside the bases of this network. Set"
                f" basis_path to the bases it was made with, or network_rank to {len(s)} and basis_path to nothing."
            )
        own = Basis(v[: self.rank], u[:, : self.rank], torch.diag(s[: self.rank]))
        basis = _filled(own, (rows, columns), self.rank)
        return {"core": basis.mean, "frozen_down": basis.down.view(self.frozen_down.shape), "frozen_up": basis.up}


def _main(weight: Tensor, rows: int, columns: int) -> Pair:
    """The singular vectors of the largest singular values of a weight (out, in)."""
    u, _, v = truncated_svd(weight, max(rows, columns))
    return v[:rows], u[:, :columns]


def _filled(given: Basis | None, own: Pair | None, rank: int) -> Basis:
    """The first `rank` directions of a basis, filled up with others where it has fewer."""
    if given is None:
        down, up = own  # type: ignore[misc]
        return Basis(down, up, torch.zeros(rank, rank))
    count = min(rank, len(given.down))
    down, up, mean = given.down[:count], given.up[:, :count], torch.zeros(rank, rank)
    mean[:count, :count] = given.mean[:count, :count]
    if count < rank and own is not None:
        down, up = _extended(down.T, own[0].T, rank).T, _extended(up, own[1], rank)
    return Basis(down.contiguous(), up.contiguous(), mean)


def _extended(columns: Tensor, more: Tensor, rank: int) -> Tensor:
    """Orthonormal columns followed by what is new in `more`, `rank` in all."""
    rest = more - columns @ (columns.T @ more)
    new = torch.linalg.svd(rest, full_matrices=False).U[:, : rank - columns.shape[1]]
    return torch.cat([columns, torch.linalg.qr(new - columns @ (columns.T @ new)).Q], dim=1)
