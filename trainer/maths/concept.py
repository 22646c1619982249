"""Moving words inside cross-attention in closed form: UCE (2308.14761) and SPEED (2503.07392), exact low-rank updates.

Rows are token embeddings: E (n, in) what is edited, V (n, in) what each is to mean, P (m, in) what must stay. For a key
or value projection W (out, in) both methods give ΔW = W·(V − E)ᵀ·D with a down matrix D (n, in) that is the same for
every layer: a LoRA of rank n, up W·(V − E)ᵀ and down D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NULL = 1e-6
"""Singular values below this share of the largest count as zero."""


def partners(own: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """(position in own, position in other) of the words of a prompt and of the end token that follows them.

    `own` and `other` are token ids without start; positions count from the start token, 0. Words are paired from the
    end backwards, since the last word carries the meaning of those before it; surplus words of `own` become the first
    of `other`, or its end token where it has none. Leading words that both share, and mean the same, are left out.
    """
    shared = 0
    while shared < min(len(own), len(other)) and own[shared] == other[shared]:
        shared += 1
    pairs = []
    for word in range(shared, len(own)):
        place = len(other) - (len(own) - word)
        pairs.append((word + 1, max(place, min(shared, len(other) - 1), 0) + 1 if other else 1))
    return [*pairs, (len(own) + 1, len(other) + 1)] if list(own) != list(other) else []


def balanced(edited_nC: Tensor, kept_mC: Tensor, ridge: float) -> Tensor:
    """D of UCE (eq. 7 without its weights): Eᵀ·(EEᵀ + PPᵀ + λI)⁻¹ with columns for rows, (n, in).

    Through A = PPᵀ + λI: D = (I + Eᵀ·A⁻¹·E)⁻¹·Eᵀ·A⁻¹. Raises nothing for λ > 0: A is positive definite.
    """
    edited, kept = edited_nC.double(), kept_mC.double()
    eye = torch.eye(edited.shape[1], dtype=torch.float64, device=edited.device)
    factor = torch.linalg.cholesky(kept.T @ kept + ridge * eye)
    solved = torch.cholesky_solve(edited.T, factor)  # A⁻¹·E, (in, n)
    small = torch.eye(len(edited), dtype=torch.float64, device=edited.device) + edited @ solved
    found: Tensor = torch.linalg.solve(small, solved.T)
    return found


def constrained(edited_nC: Tensor, kept_mC: Tensor, ridge: float) -> Tensor:
    """D of SPEED: the same with D·p = 0 for every kept row p, (n, in).

    With the projector N onto the null space of P: D = (E·N·Eᵀ + λI)⁻¹·E·N (rows), the least-squares edit under that
    constraint.
    """
    edited, kept = edited_nC.double(), kept_mC.double()
    _, values, directions = torch.linalg.svd(kept, full_matrices=False)
    basis = directions[values > NULL * values[0]]
    for _ in range(2):  # the second time removes what rounding left of the first
        edited = edited - (edited @ basis.T) @ basis
    small = edited @ edited.T + ridge * torch.eye(len(edited), dtype=torch.float64, device=edited.device)
    found: Tensor = torch.linalg.solve(small, edited)
    return found


def influence(rows_mC: Tensor, down_nC: Tensor, moved_nC: Tensor) -> Tensor:
    """How far an update moves each row, ‖(V − E)ᵀ·D·p‖ before any projection W, (m,). `moved` is V − E."""
    found: Tensor = ((rows_mC.double() @ down_nC.double().T) @ moved_nC.double()).norm(dim=1)
    return found


def most_moved(rows_mC: Tensor, moved_m: Tensor, room: int) -> Tensor:
    """Rows by influence, largest first, until they span `room` dimensions: their indices in order.

    A hard constraint on more would leave the edit no direction (SPEED filters its retain set for the same reason).
    """
    basis = rows_mC.new_zeros(0, rows_mC.shape[1], dtype=torch.float64)
    chosen = []
    for index in moved_m.argsort(descending=True).tolist():
        row = rows_mC[index].double()
        rest = row - (row @ basis.T) @ basis
        rest = rest - (rest @ basis.T) @ basis
        if float(rest.norm()) > NULL * float(row.norm()):
            if len(basis) == room:
                continue
            basis = torch.cat([basis, (rest / rest.norm())[None]])
        chosen.append(index)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def at_rank(up_ON: Tensor, down_NC: Tensor, rows_MC: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of ΔW = up·down brought to `rank`, best for the inputs `rows`, and the share of ‖ΔW·rowsᵀ‖² kept.

    Factors of rank n ≤ `rank` come back as they are. (Truncated SVD of ΔW·rowsᵀ: Eckart and Young 1936.)
    """
    if down_NC.shape[0] <= rank:
        return up_ON, down_NC, 1.0
    up, down = up_ON.double(), down_NC.double()
    seen = down @ rows_MC.double().T
    lower, values, _ = torch.linalg.svd(seen, full_matrices=False)
    scale = lower * values  # seen = scale·Q with orthonormal rows Q
    left, strength, right = torch.linalg.svd(up @ scale, full_matrices=False)
    kept = float(strength[:rank].square().sum() / strength.square().sum().clamp_min(1e-30))
    back = torch.linalg.pinv(scale)
    return (left[:, :rank] * strength[:rank]).float(), (right[:rank] @ back @ down).float(), kept


def even(up_ON: Tensor, down_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of up and rows of down of equal norms, which keeps both inside fp16's range."""
    tall, wide = up_ON.norm(dim=0).clamp_min(1e-30), down_NC.norm(dim=1).clamp_min(1e-30)
    factor = (wide / tall).sqrt()
    return up_ON * factor, down_NC / factor[:, None]
