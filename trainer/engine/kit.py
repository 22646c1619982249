"""The verbs a mode may use, bound to one model, one adapter and one job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.network import Network
from ..data.text import TextOutputs
from ..maths import rng
from ..maths.loss import distance
from ..models.base import Conditioning, Model
from ..modes.base import Batch
from .samples import SampleSettings, states


@dataclass(frozen=True)
class LossSettings:
    """What the job says about losses: names of distance and weighting, min-SNR γ (0 off), timestep range [low, high),
    one timestep per batch, TrainTrain's min-SNR for v-prediction.
    """

    distance: str = "MSE"
    weighting: str = "none"
    snr_gamma: float = 0.0
    low: int = 0
    high: int = 1000
    fixed_timesteps: bool = False
    traintrain: bool = False


class Text:
    """Conditioning of prompts: from the cache, or encoded anew at every call when the text encoder is trained."""

    def __init__(
        self, model: Model, clip_skip: int, cached: TextOutputs | None, network: Network | None = None
    ) -> None:
        self._model, self._clip_skip, self._cached, self._network = model, clip_skip, cached, network

    @property
    def trained(self) -> bool:
        """Whether the text encoders are needed in every step."""
        return self._cached is None

    def rows_each(self, prompts: Sequence[str]) -> int:
        """How many rows of its batch a text encoder computes for each of these prompts."""
        return 1 if self._cached is not None else max(map(self._model.chunk_count, prompts))

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """One row for each prompt, on the model's device."""
        if self._cached is None:
            if self._network is not None:
                self._network.draws.rows = len(prompts)
            return self._model.encode_prompts(prompts, self._clip_skip)
        outputs = self._cached.outputs(prompts)
        rows = Conditioning(outputs["context_1LD"], outputs.get("pooled_1P"))
        return rows.to(self._model.device, self._model.compute)


class Kit:
    """See `modes.base.Kit`. All draws are keyed by (seed, micro batch, position in the global batch)."""

    def __init__(self, model: Model, network: Network, text: Text, seed: int, settings: LossSettings) -> None:
        self.model, self.network, self.process = model, network, model.process
        self._text, self._seed, self._settings = text, seed, settings

    @property
    def per_sample(self) -> bool:
        """Whether one forward may have another strength for each sample."""
        return self.network.per_sample

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders are needed in every step."""
        return self._text.trained

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts, one row each: encoded at the current strength when the text encoder is
        trained.
        """
        strength = self.network.strength.value
        if not isinstance(strength, Tensor):
            return self._text(prompts)
        with self.network.at_strength(strength.repeat_interleave(self._text.rows_each(prompts))):
            return self._text(prompts)

    def latents(self, batch: Batch) -> Tensor:
        """Latents drawn from the pictures' posterior, (B, C, H, W)."""
        return batch.mean + batch.std * self._normal("posterior", batch, batch.mean)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents of both pictures of the batch's pairs, (B, C, H, W) each.

        Both are drawn with the same normal numbers: where the pictures agree, so do their latents.
        """
        if batch.target_mean is None or batch.target_std is None:
            raise ValueError("this batch has no pairs; the mode's source must give them")
        draw = self._normal("posterior", batch, batch.mean)
        return batch.mean + batch.std * draw, batch.target_mean + batch.target_std * draw

    def noise(self, batch: Batch, fixed: bool = False, purpose: str = "noise") -> Tensor:
        """Noise shaped like the batch's latents, (B, C, H, W): fresh in every step, or the same one when `fixed`."""
        if fixed:
            batch = dataclasses.replace(batch, index=0)
        return self._normal(purpose, batch, batch.mean)

    def timesteps(self, batch: Batch, strata: int = 1) -> Tensor:
        """Times in the job's range of timesteps, (B,); all alike when the job fixes them in a batch.

        The range falls into `strata` equal parts; of as many consecutive samples each part gets one, in random order.
        """
        settings = self._settings
        keys = [0] * len(batch.samples) if settings.fixed_timesteps else batch.samples
        uniforms = rng.uniform("timestep", self._seed, batch.index, keys)
        if strata > 1:
            step = 1 if settings.fixed_timesteps else batch.share
            parts = rng.strata(strata, self._seed, [batch.index * step + key for key in keys])
            uniforms = (parts + uniforms) / strata
        return self.process.draw_times(uniforms, settings.low, settings.high).to(self.model.device)

    def predict(self, x_BCHW: Tensor, t_B: Tensor, conditioning: Any, time_ids: Tensor | None = None) -> Tensor:
        """The model's prediction at x_t with the adapter at its current strength."""
        with self.network.at_timesteps(self.process.timesteps(t_B)):
            return self.model.predict(x_BCHW, t_B, conditioning, time_ids)

    def rollout(self, batch: Batch, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `modes.base.Kit`."""
        edges = self._settings.low, max(self._settings.high, self._settings.low + 1)
        low, high = map(self.process.time, edges)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        height, width = (edge * self.model.latent_factor for edge in batch.mean.shape[-2:])
        settings = SampleSettings(size=(height, width), steps=steps, cfg=1.0)
        with self.teacher():
            rows = self.text(batch.prompts)
            for state in states(self.model, rows, rows, self.noise(batch), settings):
                if state.predicted is not None and low <= state.time < high:
                    found.append((state.x, state.t, state.predicted))
                if state.time <= low:
                    break
        return iter(found)

    @contextmanager
    def strength(self, value: float | Tensor) -> Iterator[None]:
        """The adapter at another strength inside the block."""
        with self.network.at_strength(value):
            yield

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The untouched model inside the block: strength 0, no gradient."""
        with self.network.at_strength(0.0), torch.no_grad():
            yield

    def loss(self, predicted: Tensor, target: Tensor, t_B: Tensor, mask: Tensor | None = None) -> Tensor:
        """The job's distance × its weights by noise (weighting and min-SNR), per sample, (B,) float32."""
        settings, process = self._settings, self.process
        per_sample = distance(settings.distance, predicted, target, mask) * process.loss_weight(settings.weighting, t_B)
        return per_sample * process.min_snr(settings.snr_gamma, t_B, settings.traintrain)

    def _normal(self, purpose: str, batch: Batch, like: Tensor) -> Tensor:
        return rng.normal(like.shape[1:], purpose, self._seed, batch.index, batch.samples).to(like.device)
