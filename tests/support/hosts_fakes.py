"""Small stand-ins for the WebUIs, made from what was seen in the real ones: where the model lies, how its tensors are
named, what a picture with a LoRA leaves behind, and how memory is managed.

`Fake.model` is built from the tensors of a tiny checkpoint in LDM/sgm spelling; the trainer's own name maps are not
used here.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

UNET, VAE = "model.diffusion_model.", "first_stage_model."
LORA = 0.25
"""What the stand-in for a LoRA adds to the weights it is merged into."""


@functools.cache
def drawn(family: str) -> dict[str, Tensor]:
    """The tensors of a tiny checkpoint, made once."""
    return tiny.checkpoint(family)


@functools.cache
def checkpoint_file(family: str) -> Path:
    """The same as a file, written once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_file(drawn(family), folder / f"{family}.safetensors")
    return folder / f"{family}.safetensors"


class Tree(nn.Module):
    """Modules and parameters of given dotted names; has no forward."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for word in path:
                if word not in place._modules:
                    place.add_module(word, Tree({}))
                place = place._modules[word]
            if tensor.is_floating_point():
                place.register_parameter(last, nn.Parameter(tensor))
            else:
                place.register_buffer(last, tensor)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def wrap_embedding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names once the token embedding is wrapped for textual inversions."""
    return {name.replace("token_embedding.", "token_embedding.wrapped."): t for name, t in tensors.items()}


class Lock:
    """A lock with the WebUI's interface; counts who waits."""

    def __init__(self) -> None:
        self._lock, self.waiting = threading.Lock(), 0

    def acquire(self, blocking: bool = True) -> bool:
        if self._lock.acquire(False):
            return True
        if not blocking:
            return False
        self.waiting += 1
        self._lock.acquire()
        self.waiting -= 1
        return True

    def release(self) -> None:
        self._lock.release()

    @property
    def held(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Info:
    """A WebUI's record of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.filename, self.name = str(path), path.name
        self.name_for_extra, self.sha256 = path.stem, None
        self.title = f"{path.name} [0123456789]"


class Fake:
    """A WebUI in `sys.modules`, with one loaded model. `calls` are the moves between device and memory, in order."""

    def __init__(self, kind: str, family: str, folder: Path, monkeypatch: Any, dtype: torch.dtype) -> None:
        self.kind, self.family, self.folder = kind, family, folder
        self.device = torch.device("cpu")
        """What the WebUI draws on."""
        self.calls: list[str] = []
        for name in ("Stable-diffusion", "VAE", "Lora"):
            (folder / "models" / name).mkdir(parents=True)
        self.checkpoint = folder / "models" / "Stable-diffusion" / "loaded.safetensors"
        self.other = self.checkpoint.with_name("other.safetensors")
        shutil.copy(checkpoint_file(family), self.checkpoint)
        self.other.write_bytes(b"x")
        self.tensors = {}
        for name, tensor in drawn(family).items():
            self.tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
        self.lock, self.infos = Lock(), [Info(self.checkpoint), Info(self.other)]
        self.modules = self._modules()
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    # ---------------------------------------------------------------- what hosts look for

    def _modules(self) -> dict[str, Any]:
        models = self.folder / "models"
        options = {"lora_dir": str(models / "Lora"), "ckpt_dir": None, "vae_dir": None, "server_name": None}
        options |= {"listen": False, "share": False, "ngrok": None, "api_auth": None, "atelier_data_root": None}
        state = types.SimpleNamespace(begin=lambda job: None, end=lambda: None)
        aliases = {key: info for info in self.infos for key in (info.name, info.title, info.name_for_extra)}
        shared = module("modules.shared", cmd_opts=types.SimpleNamespace(**options), state=state, sd_model=None)
        shared.opts = types.SimpleNamespace(sd_model_checkpoint=self.infos[0].title, forge_additional_modules=[])
        found = {
            "modules": package("modules"),
            "modules.shared": shared,
            "modules.paths": module("modules.paths", models_path=str(models)),
            "modules.sd_models": module(
                "modules.sd_models",
                model_path=str(models / "Stable-diffusion"),
                checkpoints_list={info.title: info for info in self.infos},
                checkpoint_aliases=aliases,
                list_models=lambda: self.calls.append("list models"),
                select_checkpoint=lambda: self.infos[0],
            ),
            "modules.sd_vae": module(
                "modules.sd_vae",
                vae_dict={},
                loaded_vae_file=None,
                refresh_vae_list=lambda: self.calls.append("list vaes"),
            ),
            "modules.devices": module("modules.devices", device=self.device),
            "modules.call_queue": module("modules.call_queue", queue_lock=self.lock),
            "modules.processing": module("modules.processing", StableDiffusionProcessingTxt2Img=Drawing),
            "networks": module("networks", list_available_networks=lambda: self.calls.append("list loras")),
        }
        found["modules.scripts"] = module("modules.scripts", ScriptRunner=ScriptRunner)
        found["modules.processing"].process_images = self._process_images
        for name, one in found.items():
            if name.startswith("modules."):
                setattr(found["modules"], name.partition(".")[2], one)
        return found

    def _process_images(self, drawing: Drawing) -> Any:
        if self.kind == "reforge":  # without asking whether there are any, which the others do
            assert not drawing.scripts.alwayson_scripts
        return types.SimpleNamespace(images=[drawing])

    @property
    def data(self) -> Any:
        return self.modules["modules.sd_models"].model_data

    @property
    def cmd_opts(self) -> Any:
        return self.modules["modules.shared"].cmd_opts

    def set_device(self, device: str) -> None:
        """The WebUI draws on this device from now on."""
        self.device = self.modules["modules.devices"].device = torch.device(device)

    def load(self) -> None:
        raise NotImplementedError

    def draw_with_lora(self) -> None:
        """A picture with a LoRA: its weights stay merged into some layers."""
        raise NotImplementedError

    def live(self) -> dict[str, Tensor]:
        """Every tensor of the loaded model, wherever it lies."""
        raise NotImplementedError


class ScriptRunner:
    """Scripts that act on a picture: none, until a WebUI fills it."""

    def __init__(self) -> None:
        self.alwayson_scripts: list[Any] = []


class Drawing:
    """Keeps what a picture was asked with."""

    def __init__(self, **asked: Any) -> None:
        self.asked = asked
        self.scripts: Any = None

    def close(self) -> None:
        self.closed = True


def module(name: str, **members: Any) -> Any:
    made = types.ModuleType(name)
    made.__spec__ = types.SimpleNamespace(submodule_search_locations=None)  # type: ignore[assignment]
    made.__dict__.update(members)
    return made


def package(name: str, path: Path | None = None) -> Any:
    made = module(name)
    made.__path__ = [str(path)] if path else []
    return made


# -------------------------------------------------------------------- AUTOMATIC1111


class A1111Model(nn.Module):
    """LDM's or sgm's model with wrapped text encoders, as seen through the state of its modules."""

    def __init__(self, family: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = Tree(below(tensors, UNET))
        self.first_stage_model = Tree(below(tensors, VAE))
        self.first_stage_model.requires_grad_(False)
        self.lowvram, self.parameterization = False, "eps"
        if family == "sdxl":
            self.conditioner = nn.Module()
            embedders = [self._encoder(below(tensors, f"conditioner.embedders.{n}.")) for n in (0, 1)]
            self.conditioner.embedders = nn.ModuleList([*embedders, nn.Identity()])
            self.cond_stage_model = self.conditioner
        else:
            self.cond_stage_model = self._encoder(below(tensors, "cond_stage_model."))
        for name, part in self.named_modules():
            if isinstance(part, Tree) and "weight" in part._parameters and not name.startswith("first_stage"):
                part.network_layer_name = name.replace(".", "_")

    @staticmethod
    def _encoder(tensors: Mapping[str, Tensor]) -> nn.Module:
        wrapper = nn.Module()
        wrapper.wrapped = Tree(wrap_embedding(tensors))
        return wrapper.requires_grad_(False)


class FakeA1111(Fake):
    """AUTOMATIC1111's WebUI 1.10 with its LoRA extension, which merges in place and keeps a copy."""

    def _modules(self) -> dict[str, Any]:
        found = super()._modules()
        models = found["modules.sd_models"]
        models.model_data = types.SimpleNamespace(sd_model=None, loaded_sd_models=[])
        models.send_model_to_cpu = lambda model: self.calls.append("to memory")
        models.send_model_to_device = lambda model: self.calls.append("to device")
        found["modules.sd_unet"] = found["modules"].sd_unet = module("modules.sd_unet", current_unet=None)
        networks = found["networks"]
        networks.loaded_networks, networks.network_apply_weights = [], self._apply
        return found

    def load(self) -> None:
        model = A1111Model(self.family, self.tensors)
        model.sd_checkpoint_info = self.infos[0]
        self.data.sd_model, self.data.loaded_sd_models = model, [model]
        self.modules["modules.shared"].sd_model = model

    def _apply(self, layer: Any) -> None:
        """What the extension does before a layer's forward: in place, so it needs gradients to be off."""
        wanted = tuple(self.modules["networks"].loaded_networks)
        if getattr(layer, "network_current_names", ()) == wanted:
            return
        if getattr(layer, "backup", None) is None:
            layer.backup = layer.weight.detach().clone()
        layer.weight.copy_(layer.backup)
        if wanted:
            layer.weight.add_(LORA)
        layer.network_current_names = wanted

    def draw_with_lora(self) -> None:
        self.modules["networks"].loaded_networks.append("a LoRA")
        with torch.no_grad():
            for layer in self.data.sd_model.modules():
                if getattr(layer, "network_layer_name", None):
                    self._apply(layer)

    def live(self) -> dict[str, Tensor]:
        return dict(self.data.sd_model.named_parameters())


# -------------------------------------------------------------------- Forge and its kin


class Patcher:
    """Forge's patcher: a module, the device it runs on, and what was put into it."""

    def __init__(self, model: nn.Module, fake: Any) -> None:
        self.model, self.fake = model, fake
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        if fake.comfy:
            self.backup: dict[str, Tensor] = {}
        else:
            model.lora_loader = types.SimpleNamespace(loaded_hash="[]", backup={}, online_backup=[])

    def refresh_loras(self) -> None:
        """Make the weights those of this patcher, which has no LoRA."""
        self.fake.restore(self)


class Stand(nn.Module):
    """The outer module of a patcher."""


class FakeForge(Fake):
    """Forge: inference tensors, a merged LoRA in new parameters with the old ones kept aside."""

    comfy = False
    inference = True
    """Whether its parameters are inference tensors."""
    memory_module = "backend.memory_management"

    def _modules(self) -> dict[str, Any]:
        found = super()._modules()
        found["modules_forge"] = package("modules_forge")
        entry = module("modules_forge.main_entry", module_list={}, refresh_models=lambda: self.calls.append("list"))
        found["modules_forge.main_entry"] = found["modules_forge"].main_entry = entry
        data = types.SimpleNamespace(sd_model=types.SimpleNamespace(), forge_loading_parameters={}, forge_hash="")
        found["modules.sd_models"].model_data = data
        self.loaded: list[Any] = []
        memory = module(
            self.memory_module,
            current_loaded_models=self.loaded,
            unload_all_models=self._unload_all,
            soft_empty_cache=lambda: None,
            get_torch_device=lambda: self.device,
        )
        top = self.memory_module.split(".")[0]
        description = self.folder / "backend" / "huggingface" / "x" / "stable-diffusion-v1-5" / "tokenizer"
        tiny.vocabulary(description)
        found[top] = package(top, self.folder / top)
        found[self.memory_module] = memory
        setattr(found[top], self.memory_module.split(".")[-1], memory)
        if self.kind == "forge":
            found["modules.lowvram"] = found["modules"].lowvram = module("modules.lowvram")
        return found

    def load(self) -> None:
        with torch.inference_mode(self.inference):
            tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
            unet, clip, vae = Stand(), Stand(), Tree(below(tensors, VAE))
            unet.diffusion_model = Tree(below(tensors, UNET))
            unet.predictor = types.SimpleNamespace(prediction_type="epsilon")
            for name, text in self._texts(tensors).items():
                setattr(clip, name, Tree(text))
        objects = types.SimpleNamespace(
            unet=Patcher(unet, self),
            clip=types.SimpleNamespace(cond_stage_model=clip, patcher=Patcher(clip, self)),
            vae=types.SimpleNamespace(first_stage_model=vae),
        )
        info = self.infos[0]
        model = types.SimpleNamespace(forge_objects_original=objects, sd_checkpoint_info=info)
        model.is_sdxl = self.family == "sdxl"
        self.data.sd_model = model
        self.data.forge_loading_parameters = {"checkpoint_info": info, "additional_modules": []}
        self.data.forge_hash = str(self.data.forge_loading_parameters)
        self.objects = objects

    def _texts(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The text encoders by name: `transformer` in transformers' spelling (OpenCLIP's were converted when they were
        loaded) with the token embedding under two names, and what stands beside it.
        """
        if self.family == "sd1":
            return {"clip_l": self._encoder(below(tensors, "cond_stage_model.transformer."))}
        (_, _, width, layers) = tiny.SHAPES["sdxl"].texts[1]
        second = tiny.converted_text(dict(tensors), "open_clip", "conditioner.embedders.1.model.", width, layers)
        return {
            "clip_l": self._encoder(below(tensors, "conditioner.embedders.0.transformer.")),
            "clip_g": self._encoder({name: t for name, t in second.items() if t.is_floating_point()}),
        }

    def _encoder(self, transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: tensor for name, tensor in transformer.items() if not name.endswith("position_ids")}
        both = {**weights, **wrap_embedding(weights)}
        return {**{f"transformer.{name}": tensor for name, tensor in both.items()}, "logit_scale": torch.tensor(4.6)}

    def draw_with_lora(self) -> None:
        with torch.inference_mode():
            for patcher in (self.objects.unet, self.objects.clip.patcher):
                kept = patcher.backup if self.comfy else patcher.model.lora_loader.backup
                for path, layer in patcher.model.named_modules():
                    if "weight" in layer._parameters:
                        kept[path] = layer.weight
                        layer.weight = nn.Parameter(layer.weight + LORA, requires_grad=False)
                if not self.comfy:
                    patcher.model.lora_loader.loaded_hash = "['a LoRA']"
        self.loaded.append(types.SimpleNamespace(model="a ControlNet", model_accelerated=False))

    def restore(self, patcher: Patcher) -> None:
        kept = patcher.backup if self.comfy else patcher.model.lora_loader.backup
        for path, weight in kept.items():
            patcher.model.get_submodule(path).weight = weight
        kept.clear()
        if not self.comfy:
            patcher.model.lora_loader.loaded_hash = "[]"

    def _unload_all(self) -> None:
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("Forge moves its inference tensors in inference mode")
        if self.comfy:
            for patcher in (self.objects.unet, self.objects.clip.patcher):
                self.restore(patcher)
        self.loaded.clear()
        self.calls.append("to memory")

    def live(self) -> dict[str, Tensor]:
        objects = self.objects
        clip, vae = objects.clip.cond_stage_model, objects.vae.first_stage_model
        parts = {"unet": objects.unet.model, "clip": clip, "vae": vae}
        return {f"{part}.{name}": tensor for part, tree in parts.items() for name, tensor in tree.named_parameters()}


class FakeNeo(FakeForge):
    """Neo: as Forge, with ComfyUI's memory manager, without `modules.lowvram`; every text encoder has a projection."""

    comfy = True

    def _encoder(self, transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width = transformer["text_model.final_layer_norm.weight"].shape[0]
        return {"transformer.text_projection.weight": torch.eye(width), **super()._encoder(transformer)}


class FakeReForge(FakeForge):
    """reForge: no `backend`; ComfyUI's classes in `ldm_patched`. Its tensors are normal ones, and text is projected
    from the other side, x @ P, by a matrix beside the transformer; an encoder without one in its file gets ones.
    """

    comfy = True
    inference = False
    memory_module = "ldm_patched.modules.model_management"

    def _modules(self) -> dict[str, Any]:
        found = super()._modules()
        inner = found["ldm_patched.modules"] = package("ldm_patched.modules", self.folder)
        inner.model_management = found[self.memory_module]
        found["ldm_patched"].modules = inner
        tiny.vocabulary(self.folder / "ldm_patched" / "modules" / "sd1_tokenizer")
        record = module("modules.sd_text_encoder", current_text_encoder=None, text_encoder_options=[])
        found["modules.sd_text_encoder"] = found["modules"].sd_text_encoder = record
        return found

    def load(self) -> None:
        super().load()
        self.lend_texts(self.checkpoint)  # by default it reads the checkpoint's own a second time, as a file of its own

    def lend_texts(self, path: Path) -> None:
        """The text encoders in use are from this file."""
        info = types.SimpleNamespace(filename=str(path))
        chosen = types.SimpleNamespace(te_info=info, clip_model=self.objects.clip)
        self.modules["modules.sd_text_encoder"].current_text_encoder = chosen
        self.data.sd_model._separate_te_loaded = True

    def _encoder(self, transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = super()._encoder(transformer)
        width = transformer["text_model.final_layer_norm.weight"].shape[0]
        theirs = made.pop("transformer.text_projection.weight", torch.eye(width))
        return {**made, "text_projection": theirs.T.contiguous()}


FAKES: dict[str, type[Fake]] = {"a1111": FakeA1111, "forge": FakeForge, "neo": FakeNeo, "reforge": FakeReForge}
