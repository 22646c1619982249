"""Pictures from a model as it stands: DPM-Solver++ (2M) or DDIM of diffusers with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..maths import rng
from ..models.base import Conditioning, Model
from ..writing import write_whole
from .devices import decode, using


@dataclass(frozen=True)
class SampleSettings:
    """`size` is (height, width) in pixels; `sampler` is dpm or ddim; `cfg` 1 turns guidance off."""

    size: tuple[int, int]
    steps: int = 20
    cfg: float = 7.0
    seed: int = 0
    sampler: str = "dpm"
    clip_skip: int = 1
    batch_size: int = 8


def _scheduler(model: Model, sampler: str) -> Any:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    alphas = model.schedule.alphas_cumprod_T.cpu().double()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    common = {"trained_betas": betas.clamp_max(0.999).numpy(), "prediction_type": model.schedule.prediction}
    if sampler == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    return DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")


@torch.no_grad()
def sample_latents(
    model: Model,
    conditioning: Conditioning,
    empty: Conditioning,
    x_BCHW: Tensor,
    settings: SampleSettings,
    watch: Callable[[Tensor, int, Tensor], bool | None] | None = None,
) -> Tensor:
    """Denoise pure noise (B, C, H, W) under `conditioning` (B rows) with guidance against `empty` (B rows).

    `watch` sees every state x_t with its timestep and the prediction there; when it answers True, x_t is returned.
    """
    scheduler = _scheduler(model, settings.sampler)
    scheduler.set_timesteps(settings.steps)
    x = x_BCHW * scheduler.init_noise_sigma
    guided = settings.cfg != 1
    both = Conditioning.cat([empty, conditioning]) if guided else conditioning
    ids = model.time_ids(settings.size, (0, 0), settings.size)
    for t in scheduler.timesteps:
        wide = torch.cat([x, x]) if guided else x
        steps = torch.full((len(wide),), int(t), dtype=torch.int64, device=x.device)
        time_ids = None if ids is None else ids.expand(len(wide), -1).to(x.device)
        predicted = model.predict(wide, steps, both, time_ids).float()
        if guided:
            plain, asked = predicted.chunk(2)
            predicted = plain + settings.cfg * (asked - plain)
        if watch and watch(x, int(t), predicted):
            break
        x = scheduler.step(predicted, t, x).prev_sample
    return x


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[str],
    settings: SampleSettings,
    progress: Callable[[int, int], None] | None = None,
    text: Callable[[Sequence[str]], Conditioning] | None = None,
) -> Tensor:
    """Pictures for the prompts, (len(prompts), 3, H, W) in [−1, 1] on the CPU; picture i depends on (seed, i) alone.

    All texts first, then all latents, then all pictures, each with only the parts on the device that it needs. `text`
    gives conditionings, of the text encoders where they are wanted: None asks the model.
    """
    height, width = (edge // model.latent_factor for edge in settings.size)
    starts = range(0, len(prompts), settings.batch_size)
    parts = [list(prompts[start : start + settings.batch_size]) for start in starts]
    wanted = [[*part, *([""] * len(part))] for part in parts]
    if text is None:
        with using(model, *model.text_encoders):
            rows = [model.encode_prompts(part, settings.clip_skip) for part in wanted]
    else:
        rows = [text(part) for part in wanted]
    found: list[Tensor] = []
    with using(model, model.unet):
        for start, part, row in zip(starts, parts, rows, strict=True):
            indices = list(range(start, start + len(part)))
            noise = rng.normal((model.latent_channels, height, width), "sample", settings.seed, 0, indices)
            latents = sample_latents(
                model, row[: len(part)], row[len(part) :], noise.to(model.device), settings
            )
            found.append(latents.cpu())
            if progress:
                progress(start + len(part), len(prompts))
    with using(model, model.vae):
        return torch.cat([decode(model, latents).float().clamp(-1, 1).cpu() for latents in found])


def to_pil(picture_CHW: Tensor) -> Image.Image:
    """A picture (3, H, W) in [−1, 1] as an 8-bit RGB image."""
    levels = ((picture_CHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def write_samples(pictures_BCHW: Tensor, folder: Path, stem: str) -> tuple[Path, ...]:
    """Write `<stem>_<i>.png` below `folder`; returns the paths. Raises OSError."""
    paths = tuple(folder / f"{stem}_{index}.png" for index in range(len(pictures_BCHW)))
    for path, picture in zip(paths, pictures_BCHW, strict=True):
        image = to_pil(picture)
        write_whole(path, lambda file, image=image: image.save(file, format="PNG"))
    return paths
