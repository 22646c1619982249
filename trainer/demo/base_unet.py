"""The UNet of the tiny base model: SD1's four levels, narrow, trained on at most 60 % of the world's combinations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from . import base_common as common
from . import base_text, base_vae, reader, world

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64, 96, 96],
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "act_fn": "silu",
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
BUDGET = common.Budget(steps=7500, batch=64, rate=1.5e-3, warmup=200, save_every=300.0)
POOL = 24_000  # pictures encoded once
NOISE_OFFSET = 0.05
HARD = {"small": 2.0, "white": 1.5, "triangle": 1.5, "cross": 1.5}
"""How much more often a picture with these words is drawn: their colours came out wrong most often."""
SHAPE_WEIGHT = 4.0
"""What an error at a latent of the shape counts; one of the background counts 1."""


def build() -> UNet2DConditionModel:
    """A fresh UNet: latents `B x 4 x 8 x 8`, text states `B x 32 x 128`."""
    return UNet2DConditionModel(**CONFIG)


def load(folder: Path) -> UNet2DConditionModel:
    """The trained UNet of a diffusers folder in float32, frozen."""
    return common.load_part(build(), Path(folder) / "unet", WEIGHTS)


def alphas_cumprod() -> torch.Tensor:
    """Cumulative alphas of SD1's scaled-linear schedule, `1000`."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def loss_weights(alphas: torch.Tensor) -> torch.Tensor:
    """Weight of the epsilon loss per timestep, mean 1: v-like (SNR + 1) / SNR up to 20, times min(1, 5 / SNR).

    High-noise steps decide colour and background; unweighted epsilon loss hardly sees them.
    """
    snr = alphas / (1 - alphas)
    weights = ((snr + 1) / snr).clamp(max=20.0) * (5.0 / snr).clamp(max=1.0)
    return weights / weights.mean()


class Captions:
    """Text states of captions, each distinct one encoded once (up to a limit that random words would else exceed)."""

    def __init__(self, folder: Path, limit: int = 12_000) -> None:
        self.tokenizer, self.model = base_text.load_tokenizer(folder), base_text.load(folder)
        self.limit = limit
        self.cache: dict[str, torch.Tensor] = {}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """States `B x 32 x 128` of the captions."""
        missing = [text for text in dict.fromkeys(captions) if text not in self.cache]
        if missing:
            if len(self.cache) + len(missing) > self.limit:
                self.cache.clear()
                missing = list(dict.fromkeys(captions))
            states = base_text.encode(self.model, self.tokenizer, missing)
            self.cache.update(zip(missing, states, strict=True))
        return torch.stack([self.cache[text] for text in captions])


def make_pool(folder: Path, path: Path, seed: int, count: int = POOL) -> tuple[list[world.Scene], torch.Tensor]:
    """Scenes of the training combinations and their scaled latents `N x 4 x 8 x 8`, encoded once and kept in `path`."""
    scenes = world.draw_scenes(count, np.random.default_rng(seed), kind="base")
    state = common.load_state(path)
    if state is None:
        vae = base_vae.load(folder).to(memory_format=torch.channels_last)
        parts = []
        for start in range(0, count, 2000):
            rng = np.random.default_rng((seed, start))
            parts.append(base_vae.encode(vae, world.render(scenes[start : start + 2000], rng)))
            print(f"pool {start + len(parts[-1])}/{count}", flush=True)
        state = {"latents": torch.cat(parts)}
        common.save_state(path, state)
    return scenes, state["latents"]


def odds(scenes: list[world.Scene]) -> np.ndarray:
    """How likely each scene is drawn, `N`, sum 1."""
    likely = np.array([np.prod([HARD.get(word, 1.0) for word in vars(scene).values()]) for scene in scenes])
    return likely / likely.sum()


def shape_weights(latents: torch.Tensor) -> torch.Tensor:
    """Weight of each place of latents `N x 4 x 8 x 8`, `N x 1 x 8 x 8`: more where they differ from the background."""
    background = latents.flatten(2).median(-1).values[:, :, None, None]
    shape = (latents - background).norm(dim=1, keepdim=True) > 0.8
    return 1.0 + (SHAPE_WEIGHT - 1.0) * shape


def epsilon_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    states: torch.Tensor,
    alphas: torch.Tensor,
    weights: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Weighted epsilon loss of latents `B x 4 x 8 x 8` under text states `B x 32 x 128`; timesteps are stratified."""
    count = len(latents)
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    steps = (places * 1000).long().clamp(max=999)
    noise = torch.randn(latents.shape, generator=generator)
    noise = noise + NOISE_OFFSET * torch.randn(count, latents.shape[1], 1, 1, generator=generator)
    alpha = alphas[steps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    error = (unet(noisy, steps, states).sample - noise).square() * shape_weights(latents)
    return (weights[steps] * error.mean(dim=(1, 2, 3))).mean()


def scheduler(kind: str) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A sampler's schedule: `ddim` or `dpm++ 2m`, both with trailing timesteps. Raises ValueError on another kind."""
    shared = {
        key: SCHEDULE[key]
        for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    }
    if kind == "ddim":
        return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    if kind == "dpm++ 2m":
        return DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", timestep_spacing="trailing")
    raise ValueError(f"scheduler: kind is {kind!r}; it must be ddim or dpm++ 2m")


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    states: torch.Tensor,
    empty: torch.Tensor,
    seed: int,
    guidance: float = 2.0,
    steps: int = 12,
    kind: str = "ddim",
) -> torch.Tensor:
    """Scaled latents `N x 4 x 8 x 8` for text states `N x 32 x 128`, guided away from `empty` `1 x 32 x 128`."""
    generator, schedule = torch.Generator().manual_seed(seed), scheduler(kind)
    schedule.set_timesteps(steps)
    latents = torch.randn(len(states), 4, 8, 8, generator=generator)
    both = torch.cat([empty.expand(len(states), -1, -1), states])
    for step in schedule.timesteps:
        without, with_text = unet(torch.cat([latents, latents]), step, both).sample.chunk(2)
        latents = schedule.step(without + guidance * (with_text - without), step, latents).prev_sample
    return latents


def score(
    unet: UNet2DConditionModel, folder: Path, count: int, seed: int, captions: Captions | None = None, **settings
) -> dict[str, float]:
    """Shares of samples whose asked attributes the reader reads, for full prompts of random scenes (seen or not)."""
    captions = captions or Captions(folder)
    scenes = world.draw_scenes(count, np.random.default_rng(seed), kind="open")
    latents = sample(unet, captions([world.caption(s) for s in scenes]), captions([""]), seed, **settings)
    return reader.score(scenes, reader.read(base_vae.decode(base_vae.load(folder), latents)))


@torch.no_grad()
def prompt_gap(unet: UNet2DConditionModel, captions: Captions, step: int = 950) -> float:
    """How far predictions for red and blue differ at a high-noise step, relative to the prediction's size."""
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = [captions([f"a large {colour} circle, white background"]).expand(8, -1, -1) for colour in ("red", "blue")]
    first, second = (unet(noise, step, state).sample for state in states)
    return float((first - second).norm() / first.norm())


def train(
    work: Path, budget: common.Budget = BUDGET, seed: int = 3, ship: Path | None = None, count: int = 120
) -> None:
    """Train or continue the UNet in `work`; the best weights so far go to `work/base/unet` and to `ship`."""
    folder = work / "base"
    scenes, latents = make_pool(folder, work / "pool.pt", seed)
    captions, alphas = Captions(folder), alphas_cumprod()
    weights, likely = loss_weights(alphas), odds(scenes).cumsum()
    torch.manual_seed(seed)
    unet = build().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(unet).requires_grad_(False)

    def loss_at(step: int) -> torch.Tensor:
        rng, generator = common.step_rng(seed, step)
        rows = np.searchsorted(likely, likely[-1] * rng.random(budget.batch // common.processes()), side="right")
        states = captions([world.draw_caption(scenes[row], rng) for row in rows])
        return epsilon_loss(unet, latents[torch.from_numpy(rows)], states, alphas, weights, generator)

    on_save = keep_best({"trained": unet, "averaged": ema}, folder, captions, budget, ship, count)
    common.train("unet", unet, loss_at, budget, work / "unet.pt", on_save, ema)


def keep_best(
    unets: dict[str, UNet2DConditionModel],
    folder: Path,
    captions: Captions,
    budget: common.Budget,
    ship: Path | None,
    count: int,
) -> Callable[[int], None]:
    """A callback that scores the UNets (the trained one, and the averaged one, which lags behind when the rate falls)
    and exports the better one when it is the best of its training so far.
    """
    note = folder.parent / "unet-score.json"

    def on_save(step: int) -> None:
        scores = {}
        for name, unet in unets.items():
            scores[name] = score(unet.eval(), folder, count, 40_000, captions)
            gap = prompt_gap(unet, captions)
            print(f"unet step {step} {name}: prompt gap {gap:.4f} score {scores[name]}", flush=True)
        name = max(scores, key=lambda one: scores[one]["all"])
        best = common.read_json(note)["all"] if note.exists() else -1.0
        if scores[name]["all"] >= best or step == budget.steps:
            common.export(
                unets[name],
                folder / "unet",
                WEIGHTS,
                {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.31.0", **CONFIG},
            )
            common.write_json(note, {"step": step, "weights": name, **scores[name]})
            if ship is not None:
                common.copy_part(folder / "unet", ship / "unet")
                print(f"shipped at step {step}", flush=True)

    return on_save
