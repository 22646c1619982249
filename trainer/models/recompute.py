"""Gradient checkpointing: the activations inside the UNet's blocks are computed again in the backward pass.

Ours instead of diffusers' own switch, because a block must be repeated under the circumstances it ran in first: by the
time of the backward pass the adapter may be at another strength again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Around = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Called before a block: what it runs in now, and what it is repeated in."""

_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")


def recompute(unet: nn.Module, on: bool, around: Around | None = None) -> None:
    """Switch it on or off for every residual and transformer block of a UNet."""
    for block in unet.modules():
        if type(block).__name__ in _BLOCKS:
            block.__dict__.pop("forward", None)
            if on:
                setattr(block, "forward", _repeated(block.forward, around))  # noqa: B010 - mypy: it is a method there


def _repeated(forward: Callable[..., Any], around: Around | None) -> Callable[..., Any]:
    contexts: dict[str, Any] = {} if around is None else {"context_fn": around}

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts, **named)

    return run
