"""What the three parts of the base training share: places, checkpoints, schedule, export."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parent / "base"
SCALING_FACTOR = 0.18215  # what every SD1 loader multiplies latents with


@dataclass(frozen=True)
class Budget:
    """One training: steps, pictures a step, peak learning rate, warm-up steps, seconds between saves."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    save_every: float = 120.0


def learning_rate(step: int, budget: Budget) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak at the last step."""
    if step < budget.warmup:
        return budget.rate * (step + 1) / budget.warmup
    share = (step - budget.warmup) / max(1, budget.steps - budget.warmup)
    return budget.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def rank() -> int:
    """This process's number where several train together, else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together: one thread each is faster than threads on layers this small."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    if processes() > 1:
        gradients = [value.grad for value in parameters if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = (flat / processes()).split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def step_rng(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators that depend on seed, step and process only: a resumed training draws what an unbroken one would."""
    rng = np.random.default_rng((seed, step, rank()))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def save_state(path: Path, state: dict) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path) -> dict | None:
    """The checkpoint at `path`, or None when there is none yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def train(
    name: str,
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    budget: Budget,
    checkpoint: Path,
    on_save: Callable[[int], None] = lambda step: None,
    ema: torch.nn.Module | None = None,
    clip: float = 1.0,
) -> None:
    """Train `model` by AdamW on `loss_at(step)` up to `budget.steps`, continuing from `checkpoint` where it exists.

    `ema` is a copy of the model whose weights follow with a decay that rises to 0.999. `on_save(step)` runs after every
    checkpoint and at the end.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=budget.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    state, first = load_state(checkpoint), 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
        if ema is not None:
            ema.load_state_dict(state["ema"])
    model.train()
    began = saved = time.monotonic()
    running = 0.0
    for step in range(first, budget.steps):
        for group in optimiser.param_groups:
            group["lr"], group["fused"] = learning_rate(step, budget), True
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimiser.step()
        if ema is not None:
            follow(ema, model, min(0.999, (step + 1) / (step + 10)))
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if rank() > 0:
            continue
        if done % 100 == 0:
            speed = (done - first) * budget.batch / (time.monotonic() - began)
            print(f"{name} step {done}/{budget.steps} loss {running:.4f} {speed:.0f} samples/s", flush=True)
        if done == budget.steps or time.monotonic() - saved > budget.save_every:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done}
            save_state(checkpoint, state if ema is None else {**state, "ema": ema.state_dict()})
            on_save(done)
            model.train()
            saved = time.monotonic()


@torch.no_grad()
def follow(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights of `ema` towards those of `model`."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - decay)


def export(model: torch.nn.Module, folder: Path, weights: str, config: dict, prefix: str = "") -> None:
    """Write one part of the diffusers folder: config.json and fp16 safetensors, each replaced in one move.

    `prefix` is put before every tensor's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        prefix + name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    save_file(tensors, folder / f"{weights}.tmp", metadata={"format": "pt"})
    os.replace(folder / f"{weights}.tmp", folder / weights)
    write_json(folder / "config.json", config)


def write_json(path: Path, content: object) -> None:
    """Write readable JSON in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_part(model: torch.nn.Module, folder: Path, weights: str) -> torch.nn.Module:
    """Load fp16 weights of one part into a float32 model and set it to evaluation, frozen.

    Raises FileNotFoundError that names the training command when the part was not trained yet.
    """
    path = folder / weights
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m trainer.demo.train_base {folder.name}` first")
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=True)
    return model.eval().requires_grad_(False)


def copy_part(source: Path, target: Path) -> None:
    """Copy a finished part into another diffusers folder, file by file in one move each."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".tmp":
            shutil.copyfile(path, target / f"{path.name}.tmp")
            os.replace(target / f"{path.name}.tmp", target / path.name)


def read_json(path: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
