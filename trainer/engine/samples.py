"""Pictures from a model as it stands: DPM-Solver++ (2M) or DDIM with classifier-free guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..maths import rng
from ..maths.sampling import Visited, sampling
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


@dataclass(frozen=True)
class Drawing:
    """One picture that is asked for."""

    prompt: str
    negative: str
    settings: SampleSettings


_ORDERS = {"dpm": 2, "ddim": 1}


def states(
    model: Model, conditioning: Conditioning, empty: Conditioning, x_BCHW: Tensor, settings: SampleSettings
) -> Iterator[Visited]:
    """The states of denoising pure noise (B, C, H, W) under `conditioning` (B rows) with guidance against `empty`
    (B rows), as `maths.sampling.sampling` gives them; predictions are those under guidance.
    """
    guided = settings.cfg != 1
    both = Conditioning.cat([empty, conditioning]) if guided else conditioning
    ids = model.time_ids(settings.size, (0, 0), settings.size)

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        wide, t = (torch.cat([x, x]), torch.cat([t_B, t_B])) if guided else (x, t_B)
        time_ids = None if ids is None else ids.expand(len(wide), -1).to(x.device)
        predicted = model.predict(wide, t, both, time_ids).float()
        if not guided:
            return predicted
        plain, asked = predicted.chunk(2)
        return plain + settings.cfg * (asked - plain)

    times = model.process.sampling_times(settings.steps)
    return sampling(model.process, predict, x_BCHW, times, _ORDERS[settings.sampler])


def sample_latents(
    model: Model, conditioning: Conditioning, empty: Conditioning, x_BCHW: Tensor, settings: SampleSettings
) -> Tensor:
    """Clean latents from pure noise, (B, C, H, W); see `states`."""
    for state in states(model, conditioning, empty, x_BCHW, settings):
        x = state.x
    return x


def sample(
    model: Model,
    prompts: Sequence[str],
    settings: SampleSettings,
    progress: Callable[[int, int], None] | None = None,
    text: Callable[[Sequence[str]], Conditioning] | None = None,
) -> Tensor:
    """Pictures for the prompts, (len(prompts), 3, H, W), as `draw` makes them."""
    return torch.stack(draw(model, [Drawing(prompt, "", settings) for prompt in prompts], progress, text))


@torch.no_grad()
def draw(
    model: Model,
    drawings: Sequence[Drawing],
    progress: Callable[[int, int], None] | None = None,
    text: Callable[[Sequence[str]], Conditioning] | None = None,
) -> list[Tensor]:
    """Pictures (3, H, W) in [−1, 1] on the CPU; picture i depends on (its seed, i) and on nothing of the others.

    All texts first, then all latents, then all pictures, each with only the parts on the device that it needs. `text`
    gives conditionings, of the text encoders where they are wanted: None asks the model.
    """
    parts = batches(drawings)
    wanted = [[*(one.prompt for one in part), *(one.negative for one in part)] for _, part in parts]
    if text is None:
        with using(model, *model.text_encoders):
            rows = [
                model.encode_prompts(texts, part[0].settings.clip_skip)
                for texts, (_, part) in zip(wanted, parts, strict=True)
            ]
    else:
        rows = [text(texts) for texts in wanted]
    found: list[Tensor] = []
    with using(model, model.unet):
        for (start, part), row in zip(parts, rows, strict=True):
            settings, count = part[0].settings, len(part)
            height, width = (edge // model.latent_factor for edge in settings.size)
            indices = list(range(start, start + count))
            noise = rng.normal((model.latent_channels, height, width), "sample", settings.seed, 0, indices)
            latents = sample_latents(model, row[:count], row[count:], noise.to(model.device), settings)
            found.append(latents.cpu())
            if progress:
                progress(start + count, len(drawings))
    with using(model, model.vae):
        return [picture for latents in found for picture in decode(model, latents).float().clamp(-1, 1).cpu()]


def batches(drawings: Sequence[Drawing]) -> list[tuple[int, Sequence[Drawing]]]:
    """(place of the first, drawings) of runs with the same settings, cut to their batch size."""
    found: list[tuple[int, Sequence[Drawing]]] = []
    start = 0
    for _, group in itertools.groupby(drawings, key=lambda one: one.settings):
        alike = list(group)
        size = alike[0].settings.batch_size
        found += [(start + at, alike[at : at + size]) for at in range(0, len(alike), size)]
        start += len(alike)
    return found


def to_pil(picture_CHW: Tensor) -> Image.Image:
    """A picture (3, H, W) in [−1, 1] as an 8-bit RGB image."""
    levels = ((picture_CHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def write_samples(pictures: Sequence[Tensor], folder: Path, stem: str) -> tuple[Path, ...]:
    """Write `<stem>_<i>.png` below `folder`; returns the paths. Raises OSError."""
    paths = tuple(folder / f"{stem}_{index}.png" for index in range(len(pictures)))
    for path, picture in zip(paths, pictures, strict=True):
        image = to_pil(picture)
        write_whole(path, lambda file, image=image: image.save(file, format="PNG"))
    return paths
