"""From noise to an image by a model's predictions: DDIM and DPM-Solver++ (2M) for every noise process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .process import NoiseProcess

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t (B,)) → the model's prediction there."""


@dataclass(frozen=True)
class Visited:
    """A state of a sampling: x_t (B, C, H, W), its time, also as t (B,), and the prediction there; None where the
    sampling ends.
    """

    x: Tensor
    time: float
    t: Tensor
    predicted: Tensor | None


@torch.no_grad()
def sampling(
    process: NoiseProcess,
    predict: Predict,
    x_BCHW: Tensor,
    times: Sequence[float],
    order: int = 2,
    until: float | None = None,
) -> Iterator[Visited]:
    """The states that a sampling from x at `times[0]` passes, one for each of the falling `times`, and the one it ends
    in: the clean latents, at time 0, or x at the time `until`.

    `order` 1 is DDIM (2010.02502, eq. 12, η = 0), 2 is DPM-Solver++ (2M) (2211.01095, algorithm 2). Both go to
    α_s·D + σ_s·(x − α_t·D)/σ_t, with D the clean latents x̂₀ that the prediction implies, or in 2M those carried on by
    half a step along the last change of them. The first step and the one to clean latents are of order 1.
    """
    end = 0.0 if until is None else until
    x, before = x_BCHW, None

    for place, (time, following) in enumerate(zip(times, [*times[1:], end], strict=False)):
        t = _for_rows(time, x)
        predicted = predict(x, t)
        yield Visited(x, time, t, predicted)
        if not process.shows_image(time):  # pure noise, and the prediction says no more than that
            before = None
            continue
        clean = carried = process.x0(predicted, x, t)
        if until is None and place + 1 == len(times):
            x = clean
            break
        if order == 2 and before is not None:
            carried = clean + _half_step(process, times[place - 1], time, following) * (clean - before)
        before = clean
        signal, noise = process.signal(t, x)
        x = process.add_noise(carried, (x - signal * carried) / noise, _for_rows(following, x))
    yield Visited(x, end, _for_rows(end, x), None)


def _for_rows(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, device=x.device)


def _half_step(process: NoiseProcess, last: float, now: float, following: float) -> float:
    """Half of the step to come as a share of the one before it, both in ln(α/σ); 0 after one from pure noise."""
    one, two, three = (process.half_log_snr(time) for time in (last, now, following))
    return 0.0 if math.isinf(one) else 0.5 * (three - two) / (two - one)
