"""LaLoRA (2512.17720): the adapter is held back where ordinary pictures depend on the weights it changes.

The paper's penalty ½λ·(θ − θ₀)ᵀ·diag(F)·(θ − θ₀) uses the curvature F at the start of the LoRA's own numbers θ. At that
start the up matrix is 0, and so is every gradient of the down matrix: F would know nothing of it. Here θ is ΔW itself
(as in EWC-LoRA, 2602.17559), whose curvature is that of the base model and serves every type of adapter; θ₀ is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.checked import taken
from ..adapters.file import read_lora
from ..errors import AdapterError, TrainingError
from ..maths import rng
from ..maths.fisher import Curvature, probe, weighted_square
from ..maths.weights import weight_matrix, weight_of
from ..modes.base import Settings
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule, without_effect
from ..paths import expanded, is_file
from .base import STAGES, Preparation, Stage
from .trajectories import State, lines, trajectories

MARK, VERSION = "atelier_curvature", "1"
ROWS, COLUMNS = "curvature_out", "curvature_in"
STATES = 4
SCALE, LEAST_SCALE = 1024.0, 2.0**-12
"""States of each drawing that are measured; what fp16 gradients are multiplied with on the way, and how small that may
become where they overflow.
"""


@dataclass(frozen=True)
class LaloraParams:
    """What LaLoRA adds to the table."""

    lalora_lambda: float = param(
        0.0,
        "Strength of LaLoRA, which limits changes of weights that ordinary images depend on. Start with 1, 0 is off.",
        "option",
        low=0,
        high=1_000_000,
    )
    lalora_context_path: str = param(
        "",
        "File made by the curvature command. Empty measures before the training what ordinary images depend on.",
        "option",
        holds="file",
    )
    lalora_prompts: str = param(
        "",
        "Prompts of the ordinary images for that measurement, one per line. Empty takes a built-in list.",
        "option",
        holds="lines",
    )


def context_there(job: Job, mode: ModeInfo) -> str:
    """A context file that is not there."""
    own = job[LaloraParams]
    given = own.lalora_context_path.strip()
    if not own.lalora_lambda or not given or is_file(expanded(given)):
        return ""
    return "there is no such file; make it with the curvature tool, or leave it empty to measure before the training."


@STAGES.register("lalora")
class Lalora(Stage):
    """Adds ½λ·Σ F·ΔW² over all layers to the loss."""

    help = "Limits changes of the weights that ordinary images depend on, so that less is forgotten."
    sections = (LaloraParams,)
    rules = (
        Rule(("lalora_context_path", "lalora_lambda"), context_there, complete=True),
        without_effect("lalora_lambda", "lalora_context_path", "lalora_prompts"),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._own = settings[LaloraParams]
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        return settings[LaloraParams].lalora_lambda > 0

    def prompts(self) -> tuple[str, ...]:
        return () if self._own.lalora_context_path.strip() else lines(self._own.lalora_prompts)

    def prepare(self, at: Preparation) -> None:
        path = self._own.lalora_context_path.strip()
        if path:
            self._factors = read_context(expanded(path), at.network)
            at.tell(f"{Path(path).name} has the curvature of {len(self._factors)} of {len(at.network)} layers.")
            return
        prompts = self.prompts()
        states = trajectories(at, prompts, STATES, "lalora")
        measured = measure(at, states, {adapter.key: adapter.module for adapter in at.network})
        self._factors = {
            key: (rows.to(at.model.device), columns.to(at.model.device)) for key, (rows, columns) in measured.items()
        }
        at.tell(f"The curvature of {len(self._factors)} layers was measured on samples of {len(prompts)} prompts.")

    def penalty(self, network: Any) -> Tensor | None:
        groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        total: list[Tensor] = []
        for adapter in network:
            if adapter.key not in self._factors:
                continue
            rows, columns = self._factors[adapter.key]
            own = adapter.as_lora()
            if own is None:
                delta = adapter.delta().flatten(1)
                total.append((delta.square() * rows.to(delta)[:, None] * columns.to(delta)).sum())
                continue
            down, up = own.down.float().flatten(1), own.up.float() * own.scale
            groups.setdefault((down.shape, up.shape), []).append((down, up, columns.to(down), rows.to(up)))
        for members in groups.values():  # layers of one size at once: few operations however many layers there are
            total.append(weighted_square(*(torch.stack(column) for column in zip(*members, strict=True))).sum())
        return 0.5 * self._own.lalora_lambda * torch.stack(total).sum() if total else None


def measure(
    at: Preparation,
    states: Iterable[State],
    layers: Mapping[str, torch.nn.Module],
    by_data: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The curvature factors (out, in) of layers of the untouched model, the mean over states of one sample each.

    `by_data` takes the residuals prediction − target of the states, which then have a target (the empirical Fisher
    information); otherwise the labels are drawn from the model (see `maths.fisher`).
    """
    curvature = Curvature(layers)
    scale = SCALE if at.model.compute == torch.float16 else 1.0
    for number, state in enumerate(states):
        if at.stopping():
            break
        before = curvature.sums()
        _look(at, curvature, state, number, by_data, scale)
        while curvature.overflowed() and scale > LEAST_SCALE:
            scale /= 16
            curvature.reset(before)
            before = curvature.sums()
            _look(at, curvature, state, number, by_data, scale)
        if layer := curvature.overflowed():
            raise TrainingError(
                f"The curvature of {layer} cannot be measured: its gradients are not finite. Take"
                " train_model_precision bf16 or fp32."
            )
        curvature.samples += 1
    return curvature.factors()


def _look(at: Preparation, curvature: Curvature, state: State, number: int, by_data: bool, scale: float) -> None:
    """Add the squared gradients of one state, the backward pass being that of the prediction times `scale`."""
    with at.kit.strength(0.0), torch.enable_grad(), curvature.listening(scale):
        text = at.kit.text((state.prompt,))  # anew, so that gradients reach the text encoder where it is trained
        predicted = at.kit.predict(state.x.detach().requires_grad_(), state.t, text, state.time_ids)
        residual = predicted.detach().float() - state.target if by_data and state.target is not None else None
        weights = probe(predicted, residual, rng.generator("curvature", at.seed, number))
        predicted.backward(weights * scale)


def read_context(path: Path, network: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The curvature factors of a file for the layers of a network, by key. Raises AdapterError when it has none."""
    if not is_file(path):
        raise AdapterError(
            f"lalora_context_path = {path.name!r}: there is no such file, and every step is measured with it, also"
            f" those of a resumed run. Put it back as {path}."
        )
    tensors, metadata = read_lora(path)
    if metadata.get(MARK) != VERSION:
        raise AdapterError(f"lalora_context_path = {path.name!r}: {_not_ours(tensors)}")
    found = {}
    for adapter in network:
        name = next((name for name in (adapter.key, *adapter.also) if f"{name}.{ROWS}" in tensors), None)
        if name is None:
            continue
        rows, columns = (taken(tensors, f"{name}.{part}", 1, path.name) for part in (ROWS, COLUMNS))
        if (len(rows), len(columns)) == weight_matrix(adapter.module):
            device = weight_of(adapter.module).device
            found[adapter.key] = rows.to(device), columns.to(device)
    if not found:
        raise AdapterError(
            f"lalora_context_path = {path.name!r}: none of its layers fits a layer that is trained here. It was made"
            " for another kind of base model; leave it empty to measure before the training."
        )
    return found


def _not_ours(tensors: Mapping[str, Tensor]) -> str:
    way_out = "Make one with the curvature tool, or leave it empty to measure before the training."
    if any(name.endswith(".alpha_precision") for name in tensors):
        return (
            "this is a context of sd-scripts' fork. Its numbers belong to the coordinates of that program's universal"
            " network on one basis file (one vector per layer, the same for both sides), which no adapter here has."
            f" {way_out}"
        )
    return f"this is not a file of curvature. {way_out}"
