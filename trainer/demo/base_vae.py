"""The autoencoder of the tiny base model: SD1's layout, narrow, trained on every colour and shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from . import base_common as common
from . import reader, world

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Few groups a norm: with one channel per group the last norm would erase a channel's mean, that is, the colours.
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "block_out_channels": [16, 16, 32, 64],
    "sample_size": world.EDGE,
    "scaling_factor": common.SCALING_FACTOR,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
BUDGET = common.Budget(steps=3600, batch=16, rate=2.5e-3)
DECODER_BUDGET = common.Budget(steps=4400, batch=16, rate=1.2e-3)
BLENDS = 2  # triples of colours that are blended in every step
DECODER_NOISE = 0.05  # of the latents' standard deviation: sampled latents are never quite clean


def build() -> AutoencoderKL:
    """A fresh autoencoder: pictures `B x 3 x 64 x 64` in -1..1, latents `B x 4 x 8 x 8`."""
    return AutoencoderKL(**CONFIG)


def load(folder: Path) -> AutoencoderKL:
    """The trained autoencoder of a diffusers folder in float32, frozen."""
    return common.load_part(build(), Path(folder) / "vae", WEIGHTS)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `N x 64 x 64 x 3` to float32 `N x 3 x 64 x 64` in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """float `N x 3 x 64 x 64` in -1..1 (clipped) to uint8 `N x 64 x 64 x 3`."""
    scaled = tensor.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> torch.Tensor:
    """Posterior means times the scaling factor, `N x 4 x 8 x 8`, of uint8 pictures."""
    parts = [vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean for i in range(0, len(pictures), batch)]
    return torch.cat(parts) * common.SCALING_FACTOR


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> np.ndarray:
    """uint8 pictures of scaled latents `N x 4 x 8 x 8`."""
    parts = [
        to_pictures(vae.decode(latents[i : i + batch] / common.SCALING_FACTOR).sample)
        for i in range(0, len(latents), batch)
    ]
    return np.concatenate(parts)


def painting_error(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean L1 + MSE of `B x 3 x 64 x 64`; the shape and 4 pixels around it count four times.

    Without the rim, paint outside costs less than paint missing inside: crosses grow into lozenges and rings fill up.
    """
    error = painted - target
    inside = (target - target[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    near = nn.functional.max_pool2d(inside.float(), 9, stride=1, padding=4)
    return ((1.0 + 3.0 * near) * (error.abs() + error.square())).mean()


def hard_scenes(count: int, rng: np.random.Generator) -> list[world.Scene]:
    """Random small shapes whose inside is fine: what a decoder paints right last."""
    pool = [s for s in world.all_scenes(held_out=True) if s.size == "small" and s.shape in ("cross", "ring", "lozenge")]
    return [pool[index] for index in rng.integers(0, len(pool), count)]


@dataclass(frozen=True)
class Paint:
    """What one step paints: pictures as they are (uint8 `N x 64 x 64 x 3`), then triples that differ in colour alone,
    and the weights `T x 3` at which each triple is blended.
    """

    pictures: np.ndarray
    triples: np.ndarray
    weights: torch.Tensor

    def tensors(self) -> torch.Tensor:
        """All pictures as the encoder takes them, the triples last."""
        every = to_tensor(np.concatenate([self.pictures, self.triples]))
        return every.contiguous(memory_format=torch.channels_last)

    def blended(self, values: torch.Tensor) -> torch.Tensor:
        """Pictures or latents with the triples blended, `(N + T) x C x H x W`."""
        plain, triples = values.split([len(self.pictures), len(self.triples)])
        weights = self.weights.view(-1, 3, 1, 1, 1)
        return torch.cat([plain, (weights * triples.unflatten(0, (-1, 3))).sum(dim=1)])


def draw_paint(scenes: list[world.Scene], rng: np.random.Generator) -> Paint:
    """Pictures of the scenes and BLENDS triples of known colours.

    A blend of latents must decode to the blend of the pictures: a prompt that leaves the colour open makes the UNet
    blend, and what it then paints must not fall on a colour that it has never been shown.
    """
    triples = []
    for scene in world.draw_scenes(BLENDS, rng, kind="open"):
        seed = int(rng.integers(2**31))
        for colour in rng.choice(list(world.COLOURS), 3, replace=False):
            one = dataclasses.replace(scene, colour=str(colour))
            triples.append(world.render([one], np.random.default_rng(seed)))
    weights = torch.from_numpy(rng.dirichlet(np.ones(3), BLENDS)).float()
    return Paint(world.render(scenes, rng), np.concatenate(triples), weights)


def loss_of(vae: AutoencoderKL, paint: Paint, generator: torch.Generator) -> torch.Tensor:
    """The painting error after a draw from the posterior, plus a tiny KL that keeps the latents bounded."""
    target = paint.tensors()
    posterior = vae.encode(target).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    painted = vae.decode(paint.blended(posterior.mean + posterior.std * noise)).sample
    return painting_error(painted, paint.blended(target)) + 1e-6 * posterior.kl().mean()


def decoder_loss(vae: AutoencoderKL, paint: Paint, generator: torch.Generator) -> torch.Tensor:
    """The painting error of slightly noisy posterior means; the encoder gets no gradient."""
    target = paint.tensors()
    with torch.no_grad():
        latents = paint.blended(vae.encode(target).latent_dist.mean)
    noise = torch.randn(latents.shape, generator=generator) * DECODER_NOISE / common.SCALING_FACTOR
    return painting_error(vae.decode(latents + noise).sample, paint.blended(target))


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give the scaled latents zero mean and unit variance per channel by folding both into the 1x1 convolutions.

    `latents`: posterior means of many pictures *without* scaling factor, `N x 4 x 8 x 8`. Decoded pictures stay.
    """
    mean = latents.mean(dim=(0, 2, 3))
    scale = latents.std(dim=(0, 2, 3)) * common.SCALING_FACTOR
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    before.weight[:channels] /= scale[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / scale
    before.bias[channels:] -= 2 * scale.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= scale[None, :, None, None]


def round_trip_score(vae: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """Shares of fresh pictures, held-out words included, that the reader reads right after encode and decode."""
    rng = np.random.default_rng(seed)
    scenes = world.draw_scenes(count, rng, kind="all")
    return reader.score(scenes, reader.read(decode(vae, encode(vae, world.render(scenes, rng)))))


def finish(vae: AutoencoderKL, folder: Path, seed: int) -> dict[str, float]:
    """Normalise, round to fp16, export to `folder` and return the round-trip score of what was exported."""
    rng = np.random.default_rng(seed)
    pictures = world.render(world.draw_scenes(4096, rng, kind="base"), rng)
    final = build()
    final.load_state_dict(vae.state_dict())
    final.eval()
    normalise(final, encode(final, pictures) / common.SCALING_FACTOR)
    write(final, folder)
    return round_trip_score(load(folder), 2000, seed + 1)


def write(vae: AutoencoderKL, folder: Path) -> None:
    """Export the autoencoder to `folder`/vae."""
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.31.0", **CONFIG}
    common.export(vae, folder / "vae", WEIGHTS, config)


def train(work: Path, budget: common.Budget = BUDGET, seed: int = 1) -> None:
    """Train or continue the autoencoder in `work`; a finished part lies in `work/base/vae`."""
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        rng, generator = common.step_rng(seed, step)
        return loss_of(vae, draw_paint(world.draw_scenes(budget.batch, rng, kind="all"), rng), generator)

    def on_save(step: int) -> None:
        vae.eval()
        print("vae round trips", step, round_trip_score(vae, 256, 10_000), flush=True)

    common.train("vae", vae, loss_at, budget, work / "vae.pt", on_save)
    print("vae finished", finish(vae, work / "base", 20_000), flush=True)


def train_decoder(work: Path, budget: common.Budget = DECODER_BUDGET, seed: int = 4) -> None:
    """Train or continue the decoder alone on the finished encoder of `work`/base/vae; the latents stay as they are."""
    torch.manual_seed(seed)
    vae = load(work / "base").to(memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss_at(step: int) -> torch.Tensor:
        rng, generator = common.step_rng(seed, step)
        half = budget.batch // 2 // common.processes()
        scenes = world.draw_scenes(half, rng, kind="all") + hard_scenes(half, rng)
        return decoder_loss(vae, draw_paint(scenes, rng), generator)

    def on_save(step: int) -> None:
        vae.eval()
        write(vae, work / "base")
        print("decoder round trips", step, round_trip_score(vae, 500, 10_000), flush=True)

    common.train("decoder", vae, loss_at, budget, work / "decoder.pt", on_save)
    if common.rank() == 0:
        print("decoder finished", round_trip_score(load(work / "base"), 2000, 20_001), flush=True)
