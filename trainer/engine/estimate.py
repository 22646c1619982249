"""How much memory each phase of a run takes: the weights it has on the device, and what its work allocates there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.scaling import takes_mask
from ..models.base import Conditioning
from ..optim.optimizers import state_bytes
from ..params import core
from . import arguments
from .devices import TILE, WHOLE
from .memory import layout, module_bytes, remembered, step_bytes
from .samples import SampleSettings, batches
from .session import Session
from .shortage import IMAGES, PREPARING, PREVIEW, TEXTS, TRAINING

Work = Callable[[], Tensor]


def phase_bytes(session: Session, cache: Path) -> dict[str, int]:
    """Bytes at the peak of each phase, by its name and in order; figures are remembered in `cache`.

    What rests in main memory is left out where the device has memory of its own. The figures are of tensors: a CUDA
    context, workspaces and fragmentation come on top, some 0.5 to 1 GiB.
    """
    return _Phases(session, cache).all()


def needed(session: Session, cache: Path, name: str) -> int:
    """The bytes of one of these phases. Raises KeyError for one that this session has not."""
    return phase_bytes(session, cache)[name]


class _Phases:
    def __init__(self, session: Session, cache: Path) -> None:
        self._session, self._model, self._cache = session, session.model, cache
        self._trained = session.model.text_encoders if session.kit.trains_text else ()
        self._adapters = module_bytes([session.network, *session.beneath])
        self._batch = session.source.heaviest()

    def all(self) -> dict[str, int]:
        session, model, found = self._session, self._model, {}
        if session.mode.source != "prompts" and model.vae is not None:
            found[IMAGES] = self._weights(model.vae) + self._adapters + self._encoding(model.vae)
        if not self._trained:
            found[TEXTS] = self._weights(*model.text_encoders) + self._adapters + self._texts()
        if not session.limits.total_steps:
            return {**found, PREPARING: self._weights(model.unet) + self._adapters}
        trained = sum(master.numel() for master in session.flat.masters)
        kept = self._adapters + session.flat.own_bytes
        kept += state_bytes(session.job[core.Train].train_optimizer, trained)
        if not session.scaler.is_enabled() and not takes_mask(session.optimizer):
            kept += 4 * trained  # the copy to undo a step with
        unet = self._weights(model.unet, *self._trained) + kept
        found[TRAINING] = unet + self._step()
        drawn = batches(arguments.previews(session.job))
        if drawn and model.vae is not None:
            largest = max((part for _, part in drawn), key=lambda part: len(part) * math.prod(part[0].settings.size))
            count, settings = len(largest), largest[0].settings
            decoding = self._weights(model.vae) + kept + self._decoding(model.vae, count, settings)
            found[PREVIEW] = max(unet + self._sampling(count, settings), decoding)
        return found

    def _weights(self, *used: nn.Module) -> int:
        """Bytes on the device while these parts are used: theirs, and those of parts whose place it is anyway."""
        parts = [part for part in self._model.parts if part in used or self._model.rests_here(part)]
        return module_bytes(parts)

    def _known(self, phase: str, modules: Sequence[nn.Module], work: Work, **facts: object) -> int:
        """Bytes that `work` allocates on the device, forward and, where there is a gradient, backward."""
        device = self._model.device
        known = {
            "phase": phase,
            "torch": torch.__version__,
            "device": device.type,
            "compute": self._model.compute,
            "layout": layout(modules),
            **facts,
        }
        return remembered(self._cache, known, lambda: step_bytes(modules, work, device))

    # ---------------------------------------------------------------- the work of each phase

    def _encoding(self, vae: Any) -> int:
        shape = (1, 3, *self._session.source.shape(self._batch)[1:3])

        def encode() -> Tensor:
            return self._model.encode_images(torch.zeros(shape))[0]

        return self._known(IMAGES, [vae], encode, shape=shape)

    def _texts(self) -> int:
        clip_skip = self._session.job[core.Train].train_clip_skip

        def encode() -> Tensor:
            with torch.no_grad():
                return self._model.encode_prompts([""], clip_skip).context_BLD

        return self._known(TEXTS, self._model.text_encoders, encode)

    def _modules(self) -> list[nn.Module]:
        session, model = self._session, self._model
        return [model.unet, *self._trained, *session.beneath, session.network]

    def _step(self) -> int:
        """Forward and backward of the heaviest batch, or of what a stage differentiates beside it if that is more."""
        session, index = self._session, self._batch
        rows = max((stage.rows for stage in session.stages), default=0)

        def loss() -> Tensor:
            batch = session.source.batch(index)
            return torch.zeros(()) if batch is None else session.mode.loss(session.kit, batch)

        def predictions() -> Tensor:
            batch, kit = session.source.batch(index), session.kit
            if batch is None:
                return torch.zeros(())
            x, ids = batch.mean[:1].expand(rows, -1, -1, -1), batch.time_ids
            ids = None if ids is None else ids[:1].expand(rows, -1)
            t = torch.zeros(rows, device=x.device)
            predicted = kit.predict(x, t, kit.text(batch.prompts[:1] * rows), ids)
            return predicted.float().square().mean((1, 2, 3))

        facts = {
            "mode": session.job[core.Task].mode,
            "checkpointing": session.job[core.Train].use_gradient_checkpointing,
            "latents": session.source.shape(index),
        }
        step = self._known(TRAINING, self._modules(), loss, **facts)
        return max(step, self._known(TRAINING, self._modules(), predictions, **facts, rows=rows)) if rows else step

    def _sampling(self, pictures: int, settings: SampleSettings) -> int:
        """One prediction under guidance."""
        model, rows = self._model, pictures * (1 if settings.cfg == 1 else 2)
        height, width = (edge // model.latent_factor for edge in settings.size)

        def predict() -> Tensor:
            with torch.no_grad():
                text: Conditioning = self._session.kit.text([""]).expand(rows)
                ids = model.time_ids(settings.size, (0, 0), settings.size)
                x = torch.zeros(rows, model.latent_channels, height, width, device=model.device)
                t = torch.zeros(rows, device=model.device)
                return model.predict(x, t, text, None if ids is None else ids.expand(rows, -1))

        return self._known(PREVIEW, self._modules(), predict, rows=rows, size=settings.size)

    def _decoding(self, vae: Any, pictures: int, settings: SampleSettings) -> int:
        model = self._model
        shape = (pictures, model.latent_channels, *(edge // model.latent_factor for edge in settings.size))
        large = model.device.type != "cpu" and settings.size[0] * settings.size[1] > WHOLE
        return self._known(
            PREVIEW, [vae], lambda: model.decode(torch.zeros(shape), TILE if large else 0), shape=shape, tiled=large
        )
