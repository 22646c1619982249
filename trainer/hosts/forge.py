"""Forge, Forge Neo and reForge: the model lies in patchers, and a memory manager decides what is on the device."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NotAdoptable
from ..models.detect import TEXT_PREFIXES, UNET, VAE
from ..models.live import Live, is_clip, is_vae
from .names import same_file
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
_PROJECTION = "conditioner.embedders.1.transformer.text_projection.weight"


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
        """The loaded model without LoRA, moved off the device with everything else."""
        model = self._model()
        original = model.forge_objects_original
        foreign: tuple[str, ...] = (VAE,) if self.loaded_vae() else ()
        if any(not is_vae(path) for path in self._modules()):
            foreign += TEXT_PREFIXES
        with torch.inference_mode():  # as Forge does it: its parameters are inference tensors
            self._take_out_loras(original.unet, original.clip.patcher)
        self._check(original.unet, original.clip.patcher)
        info = model.sd_checkpoint_info
        return Live(
            path=Path(info.filename),
            tensors=named_tensors(original, bool(getattr(model, "is_sdxl", False))),
            prediction=_PREDICTIONS.get(str(_predictor(original.unet.model))),
            sha256=getattr(info, "sha256", None) or "",
            foreign=foreign,
        )

    def draws_on(self) -> torch.device | str | None:
        """The device of Forge's memory manager."""
        device: torch.device = self._memory().get_torch_device()
        return device

    def _take_out_loras(self, unet: Any, clip: Any) -> None:
        """Move everything off the device and put the bare weights back. The training brings what it uses itself."""
        self._memory().unload_all_models()
        for patcher in (unet, clip):
            patcher.refresh_loras()
        self._memory().soft_empty_cache()

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
        with torch.inference_mode():
            self._memory().unload_all_models()
        gc.collect()
        self._memory().soft_empty_cache()


class Comfy(Forge):
    """The forks that took over ComfyUI's memory manager: unloading puts the original weights back by itself."""

    def _take_out_loras(self, unet: Any, clip: Any) -> None:
        self._memory().unload_all_models()
        self._memory().soft_empty_cache()

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

    def loaded_texts(self) -> tuple[Path, ...]:
        """The checkpoint that lends its text encoders, when another one than the loaded is chosen for that."""
        lender, loaded = self._lender(), self.loaded_path()
        own = lender is None or loaded is None or same_file(lender, loaded)
        return () if own or lender is None else (lender,)

    def _lender(self) -> Path | None:
        """The file that the text encoders in use were read from, often the checkpoint's own; None: not on record.

        The record may also be of text encoders that were loaded and are not used.
        """
        try:
            from modules import sd_text_encoder
        except ImportError:  # before July 2025 it had no such setting
            return None
        encoder, model = sd_text_encoder.current_text_encoder, self._model()
        if model is None or getattr(encoder, "clip_model", None) is not model.forge_objects_original.clip:
            return None
        return Path(encoder.te_info.filename)

    def _modules(self) -> tuple[Path, ...]:
        vae = self.loaded_vae()
        return (*(() if vae is None else (vae,)), *self.loaded_texts())

    def lay_bare(self, restore: ExitStack) -> Live:
        """As in Forge. Raises NotAdoptable when it is not known where its text encoders are from."""
        if getattr(self._model(), "_separate_te_loaded", False) and self._lender() is None:
            raise NotAdoptable("its text encoders are another model's, and reForge no longer knows which")
        return super().lay_bare(restore)

    def _listed(self) -> dict[str, str]:
        from modules import sd_vae

        return dict(sd_vae.vae_dict)

    def text_encoders(self) -> tuple[str, ...]:
        """The files in its folder of text encoders."""
        return tuple(sorted(self._text_files()))

    def _text_files(self) -> dict[str, str]:
        try:
            from modules import sd_text_encoder
        except ImportError:
            return {}
        paths = [Path(option.te_info.filename) for option in sd_text_encoder.text_encoder_options]
        return {path.name: str(path) for path in paths if "text_encoder" in path.parent.name}

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
    texts = objects.clip.cond_stage_model.state_dict()
    for name, tensor in texts.items():
        for theirs, ours in _ENCODERS[sdxl].items():
            if name.startswith(theirs):  # beside them lie scales for the logits, and what marks a wrapped embedding
                found[ours + name[len(theirs) :].replace(".wrapped.", ".")] = tensor
    if sdxl and "clip_g.text_projection" in texts:  # ComfyUI multiplies from the other side: x @ projection
        found[_PROJECTION] = texts["clip_g.text_projection"].T
    return found


def _predictor(model: Any) -> str:
    """What the K-model takes the UNet's output for."""
    if hasattr(model, "predictor"):
        return str(model.predictor.prediction_type).lower()
    return str(getattr(getattr(model, "model_type", None), "name", "")).lower()
