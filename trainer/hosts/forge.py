"""Forge, Forge Neo and reForge: the model lies in patchers, and a memory manager decides what is on the device."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.live import TEXT_PREFIXES, UNET, VAE, Live, NotAdoptable, is_clip, is_vae
from .webui import WebUI

_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v_prediction"}
_ENCODERS = {
    False: {
        "clip_l.transformer.": "cond_stage_model.transformer.",
        "clip_h.transformer.": "cond_stage_model.transformer.",
    },
    True: {
        "clip_l.transformer.": "conditioner.embedders.0.transformer.",
        "clip_g.transformer.": "conditioner.embedders.1.transformer.",
    },
}
_EVERYTHING = 1e30


class Forge(WebUI):
    """Stable Diffusion WebUI Forge."""

    name = "Forge"

    def _memory(self) -> Any:
        from backend import memory_management

        return memory_management

    def _model(self) -> Any:
        """The loaded model; None while Forge has only its stand-in."""
        from modules import sd_models

        model = sd_models.model_data.sd_model
        return model if getattr(model, "forge_objects_original", None) is not None else None

    def loaded_path(self) -> Path | None:
        """The file of the model in memory, unless another one has been selected since."""
        info = getattr(self._model(), "sd_checkpoint_info", None)
        if info is None or not self._is_current():
            return None
        return Path(info.filename)

    def _is_current(self) -> bool:
        """Whether the model in memory is what the next picture would be drawn with."""
        from modules import sd_models

        data = sd_models.model_data
        return bool(data.forge_hash) and data.forge_hash == str(data.forge_loading_parameters)

    def selected_path(self) -> Path | None:
        """The file of the model that the next picture would load."""
        from modules import sd_models

        info = sd_models.model_data.forge_loading_parameters.get("checkpoint_info")
        info = sd_models.select_checkpoint() if info is None else info
        return None if info is None else Path(info.filename)

    def _modules(self) -> tuple[Path, ...]:
        """The files chosen beside the checkpoint: VAE and text encoders."""
        from modules import sd_models, shared

        given = sd_models.model_data.forge_loading_parameters.get("additional_modules")
        given = getattr(shared.opts, "forge_additional_modules", ()) if given is None else given
        return tuple(Path(path) for path in given or ())

    def loaded_vae(self) -> Path | None:
        """The VAE file among them."""
        return next((path for path in self._modules() if is_vae(path)), None)

    def loaded_texts(self) -> tuple[Path, ...]:
        """The text encoders among them."""
        return tuple(path for path in self._modules() if is_clip(path))

    def _listed(self) -> dict[str, str]:
        """Name → path of all VAE and text encoder files Forge knows."""
        from modules_forge import main_entry

        return dict(main_entry.module_list)

    def vaes(self) -> tuple[str, ...]:
        """The VAE files: what lies in a folder of text encoders is left out."""
        encoders = set(self.text_encoders())
        return tuple(sorted(name for name in self._listed() if name not in encoders))

    def text_encoders(self) -> tuple[str, ...]:
        """The text encoder files."""
        return tuple(sorted(name for name, path in self._listed().items() if "text_encoder" in Path(path).parent.name))

    def _text_files(self) -> dict[str, str]:
        return {name: path for name, path in self._listed().items() if name in self.text_encoders()}

    def refresh(self) -> None:
        """Make Forge look for new files."""
        from modules_forge import main_entry

        main_entry.refresh_models()

    def _vae_files(self, sd_vae: Any) -> dict[str, str]:
        return self._listed()

    def vocabularies(self) -> tuple[Path, ...]:
        """CLIP's vocabulary in the model descriptions that Forge ships."""
        import backend

        folder = Path(next(iter(backend.__path__))) / "huggingface"
        return tuple(found.parent for found in sorted(folder.glob("*/stable-diffusion-*/tokenizer/vocab.json")))

    # ---------------------------------------------------------------- lending

    def lay_bare(self, restore: ExitStack) -> Live:
        """The loaded model without LoRA, its UNet on the device, everything else moved off it."""
        model = self._model()
        original = model.forge_objects_original
        if any(not is_vae(path) for path in self._modules()):
            foreign = (VAE, *TEXT_PREFIXES)
        else:
            foreign = (VAE,) if self._modules() else ()
        with torch.inference_mode():  # as Forge does it: its parameters are inference tensors
            self._bring(original.unet, original.clip.patcher)
        self._check(original.unet, original.clip.patcher)
        info = model.sd_checkpoint_info
        return Live(
            path=Path(info.filename),
            tensors=named_tensors(original, bool(getattr(model, "is_sdxl", False))),
            prediction=_PREDICTIONS.get(str(_predictor(original.unet.model))),
            sha256=getattr(info, "sha256", None) or "",
            foreign=foreign,
        )

    def _bring(self, unet: Any, clip: Any) -> None:
        """Put the bare UNet on the device, take the LoRA out of the text encoders, and move all others away."""
        memory = self._memory()
        memory.load_models_gpu([unet])
        clip.refresh_loras()
        mine = [entry for entry in memory.current_loaded_models if entry.model is unet]
        if memory.get_torch_device().type != "cpu":
            memory.free_memory(_EVERYTHING, memory.get_torch_device(), mine)
        memory.soft_empty_cache()
        if any(getattr(entry, "model_accelerated", False) for entry in mine):
            raise NotAdoptable("it does not fit on the device as a whole, so Forge keeps parts of it elsewhere")

    def _check(self, unet: Any, clip: Any) -> None:
        """Raise NotAdoptable when a patch is left in the weights."""
        for patcher in (unet, clip):
            loader = getattr(patcher.model, "lora_loader", None)
            if loader is None or loader.loaded_hash != str([]) or loader.backup or loader.online_backup:
                raise NotAdoptable("a LoRA could not be taken out of its weights")
            if patcher.object_patches or patcher.object_patches_backup:
                raise NotAdoptable("an extension has replaced parts of it")

    def make_room(self, restore: ExitStack) -> None:
        """Everything goes to memory; Forge brings back what the next picture needs."""
        self._memory().unload_all_models()
        gc.collect()
        self._memory().soft_empty_cache()


class Comfy(Forge):
    """The forks that took over ComfyUI's memory manager: what is in memory rather than on the device is adopted.

    Unloading is the one operation all their versions share, and it puts the original weights back. The training moves
    the UNet to the device itself, so there is still one copy on it.
    """

    def _bring(self, unet: Any, clip: Any) -> None:
        memory = self._memory()
        memory.unload_all_models()
        memory.soft_empty_cache()

    def _check(self, unet: Any, clip: Any) -> None:
        for patcher in (unet, clip):
            if getattr(patcher, "backup", None) or getattr(patcher, "hook_backup", None):
                raise NotAdoptable("a LoRA could not be taken out of its weights")
            if getattr(patcher, "object_patches_backup", None) or getattr(patcher, "is_injected", False):
                raise NotAdoptable("an extension has replaced parts of it")


class Neo(Comfy):
    """Forge Neo."""

    name = "Forge Neo"


class ReForge(Comfy):
    """reForge: AUTOMATIC1111's lists and settings around ComfyUI's model classes."""

    name = "reForge"

    def _memory(self) -> Any:
        from ldm_patched.modules import model_management

        return model_management

    def _is_current(self) -> bool:
        return True

    def selected_path(self) -> Path | None:
        """The file of the model chosen in the settings."""
        from modules import sd_models, shared

        info = sd_models.checkpoint_aliases.get(getattr(shared.opts, "sd_model_checkpoint", None))
        return None if info is None else Path(info.filename)

    def loaded_vae(self) -> Path | None:
        """The VAE file in use."""
        from modules import sd_vae

        return Path(sd_vae.loaded_vae_file) if sd_vae.loaded_vae_file else None

    def _modules(self) -> tuple[Path, ...]:
        vae = self.loaded_vae()
        return () if vae is None else (vae,)

    def _listed(self) -> dict[str, str]:
        from modules import sd_vae

        return dict(sd_vae.vae_dict)

    def refresh(self) -> None:
        """Make reForge look for new models."""
        WebUI.refresh(self)

    def vocabularies(self) -> tuple[Path, ...]:
        """CLIP's vocabulary that its text encoders come with."""
        import ldm_patched

        return (Path(next(iter(ldm_patched.__path__))) / "modules" / "sd1_tokenizer",)


def named_tensors(objects: Any, sdxl: bool) -> dict[str, Tensor]:
    """The tensors of Forge's objects under the names that a checkpoint file has."""
    unet = objects.unet.model.diffusion_model.state_dict()
    found = {UNET + name: tensor for name, tensor in unet.items()}
    found.update({VAE + name: tensor for name, tensor in objects.vae.first_stage_model.state_dict().items()})
    for name, tensor in objects.clip.cond_stage_model.state_dict().items():
        for theirs, ours in _ENCODERS[sdxl].items():
            if name.startswith(theirs):  # beside them lie scales for the logits, and what marks a wrapped embedding
                found[ours + name[len(theirs) :].replace(".wrapped.", ".")] = tensor
    return found


def _predictor(model: Any) -> str:
    """What the K-model takes the UNet's output for."""
    if hasattr(model, "predictor"):
        return str(model.predictor.prediction_type).lower()
    return str(getattr(getattr(model, "model_type", None), "name", "")).lower()
