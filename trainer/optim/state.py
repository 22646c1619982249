"""The state of optimizers, schedulers and scalers as tensors + JSON, and back, without losing a bit.

Hosts replace `torch.load`, and pickles run code: a state is kept as safetensors for the tensors and JSON for the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors by path, copied to the CPU, and everything else of `tree` as JSON values that refer to them.

    Takes dicts with any plain keys, lists, tuples, counters, tensors, dtypes, numbers (also infinite), texts and None;
    raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(tree, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """The tree that `flatten` took apart."""
    if isinstance(value, list):
        return [unflatten(tensors, item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(unflatten(tensors, item) for item in content)
    pairs = {unflatten(tensors, key): unflatten(tensors, item) for key, item in content}
    return Counter(pairs) if kind == "counter" else pairs


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        while path in tensors:  # {"a.b": …} and {"a": {"b": …}} spell the same path
            path += "'"
        # A copy of its own: groups share tensors, and safetensors refuses shared or strided storage.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).rpartition(".")[2]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        # Pairs, not a JSON object: optimizer states have integer keys.
        return {kind: [[_encode(k, "", tensors), _encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    raise TypeError(f"a state holds a {type(value).__name__} at {path or 'its root'}, which cannot be kept")


def restore(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a `state_dict()` of the same optimizer exactly: dtypes, memory layout and tensors kept in groups included.
    Raises what a state that is not of this optimizer leads to, ValueError for shapes that a fused step would not find.

    `Optimizer.load_state_dict` casts floating state to the dtype of its parameter and leaves group tensors on the CPU.
    """
    optimizer.load_state_dict(dict(state))
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(numbers, parameters, strict=True):
        if i in state["state"]:
            optimizer.state[p] = _exact(optimizer.state[p], state["state"][i], p)
    _check_fused(optimizer)
    for group in optimizer.param_groups:
        device = group["params"][0].device
        for key, value in group.items():
            if isinstance(value, Tensor):
                group[key] = value.to(device)


def _check_fused(optimizer: Optimizer) -> None:
    """Raise ValueError when a fused kernel, which does not look at sizes, would go beyond the end of its state."""
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            for key, value in optimizer.state.get(p, {}).items():
                wanted = p.shape if key != "step" else torch.Size([])
                if isinstance(value, Tensor) and value.shape != wanted:
                    raise ValueError(f"{key} has the shape {tuple(value.shape)}, not {tuple(wanted)}")


def _exact(loaded: Any, saved: Any, like: Tensor) -> Any:
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        kept = loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
        if kept.shape == like.shape and kept.stride() != like.stride():
            # Fused kernels walk parameter and state side by side: both need the same layout.
            kept = torch.empty_like(like, dtype=kept.dtype, device=kept.device).copy_(kept)
        return kept
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        return {key: _exact(value, saved.get(key), like) for key, value in loaded.items()}
    return loaded
