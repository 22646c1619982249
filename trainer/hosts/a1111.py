"""AUTOMATIC1111's WebUI 1.10: its model is an LDM or sgm object whose encoders are wrapped."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NotAdoptable
from ..models.detect import VAE
from ..models.live import Live
from .webui import WebUI

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


class A1111(WebUI):
    """AUTOMATIC1111's WebUI."""

    name = "the WebUI"

    def _model(self) -> Any:
        """The loaded model, without making the WebUI load one."""
        from modules import sd_models

        return sd_models.model_data.sd_model

    def loaded_path(self) -> Path | None:
        """The file of the loaded model."""
        info = getattr(self._model(), "sd_checkpoint_info", None)
        return None if info is None else Path(info.filename)

    def selected_path(self) -> Path | None:
        """The file of the model chosen in the settings."""
        from modules import sd_models, shared

        info = sd_models.checkpoint_aliases.get(getattr(shared.opts, "sd_model_checkpoint", None))
        return None if info is None else Path(info.filename)

    def loaded_vae(self) -> Path | None:
        """The VAE file in use."""
        from modules import sd_vae

        return Path(sd_vae.loaded_vae_file) if sd_vae.loaded_vae_file else None

    def lay_bare(self, restore: ExitStack) -> Live:
        """The loaded model without LoRA; all models go to memory meanwhile, the training brings what it uses."""
        model = self._model()
        self._refuse()
        self.make_room(restore)
        take_out_loras(model)
        info = model.sd_checkpoint_info
        return Live(
            path=Path(info.filename),
            tensors=named_tensors(model),
            prediction=_PREDICTIONS.get(str(getattr(model, "parameterization", ""))),
            sha256=info.sha256 or "",
            foreign=(VAE,) if self.loaded_vae() else (),
        )

    def draws_on(self) -> torch.device | str | None:
        """The device the WebUI chose at its start, --device-id and --use-cpu included."""
        from modules import devices

        device: torch.device | None = devices.device
        return device

    def _refuse(self) -> None:
        from modules import sd_unet

        if getattr(sd_unet, "current_unet", None) is not None:
            raise NotAdoptable("another engine (such as TensorRT) runs in the place of its UNet")

    def make_room(self, restore: ExitStack) -> None:
        """All loaded models go to memory, and those that were on the device come back."""
        from modules import sd_models

        for model in list(sd_models.model_data.loaded_sd_models):
            if getattr(model, "lowvram", False) or _device(model).type != "cpu":
                restore.callback(sd_models.send_model_to_device, model)
                sd_models.send_model_to_cpu(model)


def _device(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found


def take_out_loras(model: Any) -> None:
    """Give every layer the weights it had before the last picture's LoRA was merged into it."""
    networks = sys.modules.get("networks")
    if networks is None:  # the LoRA extension is switched off
        return
    networks.loaded_networks.clear()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "network_layer_name", None) is not None and _was_merged(module):
                networks.network_apply_weights(module)


def _was_merged(module: Any) -> bool:
    return bool(getattr(module, "network_current_names", ()))


def named_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of UNet, VAE and text encoders under the names that a checkpoint file has."""
    found = _below("model.diffusion_model.", model.model.diffusion_model)
    found.update(_below(VAE, model.first_stage_model))
    if getattr(model, "conditioner", None) is None:
        found.update(_below("cond_stage_model.", _unwrapped(model.cond_stage_model)))
        return found
    for index, embedder in enumerate(model.conditioner.embedders):
        if hasattr(embedder, "wrapped"):
            found.update(_below(f"conditioner.embedders.{index}.", embedder.wrapped))
    return found


def _unwrapped(encoder: Any) -> Any:
    """A text encoder without the wrapper that reads emphasis and chunks."""
    return getattr(encoder, "wrapped", encoder)


def _below(prefix: str, module: Any) -> dict[str, Tensor]:
    """State of a module under a prefix; the wrapper around the token embedding leaves no trace in the names."""
    return {prefix + name.replace(".wrapped.", "."): tensor for name, tensor in module.state_dict().items()}
