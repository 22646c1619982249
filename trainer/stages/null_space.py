"""The null space of activations (LoRA-Null, 2503.02659; AlphaEdit, 2410.02355): what ordinary inputs do not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..maths import rng
from ..modes.base import Settings
from ..params.core import Network
from ..params.spaces import NullParams
from .base import STAGES, Preparation, Stage
from .trajectories import lines, trajectories

STEPS, ROWS = 8, 1024
"""States of each drawing that are looked at, and how many inputs are kept for each layer."""


@STAGES.register("null space")
class NullSpace(Stage):
    """Lets the untouched model draw ordinary prompts, and freezes Null-LoRA where the inputs of layers are weakest."""

    help = "Finds the directions that the inputs of a layer do not use for ordinary prompts."

    @classmethod
    def wanted(cls, settings: Settings) -> bool:
        kind, own = settings[Network].network_type, settings[NullParams]
        return kind == "null" and own.network_null_space == "activations"

    def prompts(self) -> tuple[str, ...]:
        return lines(self.settings[NullParams].network_null_prompts)

    def prepare(self, at: Preparation) -> None:
        if at.resumed:
            return
        prompts, adapters = self.prompts(), list(at.network)
        seen: dict[str, list[Tensor]] = {adapter.key: [] for adapter in adapters}
        hooks = []
        for adapter in adapters:
            calls = len(prompts) * (1 if adapter.part.startswith("te") else STEPS)
            keep = _keep(adapter.key, seen[adapter.key], -(-ROWS // calls))
            hooks.append(adapter.module.register_forward_pre_hook(keep))
        try:
            for _ in trajectories(at, prompts, STEPS + 1, "null space"):  # the last state is only arrived at
                if at.stopping():
                    return
        finally:
            for hook in hooks:
                hook.remove()
        changed = sum(adapter.calibrate(torch.cat(seen[adapter.key])) for adapter in adapters if seen[adapter.key])
        rest = len(adapters) - changed
        left = f" {rest} layers keep the null space they have." if rest else ""
        at.tell(f"The inputs of {changed} layers were measured while sampling {len(prompts)} ordinary prompts.{left}")


def _keep(key: str, into: list[Tensor], count: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that keeps `count` random rows (in the layer's flattened weight) of every call."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if isinstance(module, nn.Conv2d):
            geometry = {"padding": module.padding, "stride": module.stride, "dilation": module.dilation}
            rows = functional.unfold(x.float(), module.kernel_size, **geometry).transpose(1, 2)
            rows = rows.reshape(-1, rows.shape[-1])
        else:
            rows = x.reshape(-1, x.shape[-1])
        draws = rng.generator("null space", key, len(into))
        chosen = torch.randperm(len(rows), generator=draws)[:count]
        into.append(rows[chosen.to(rows.device)].float().cpu())

    return hook
