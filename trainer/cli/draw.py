"""Pictures of a prompt with our own sampler, with a LoRA file or without, for where there is no WebUI to draw them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..adapters.file import read_lora
from ..adapters.file_delta import DOWN, plain_layers
from ..adapters.foreign import read_any
from ..adapters.metadata import JOB_KEY
from ..adapters.network import Network
from ..engine import shortage
from ..engine.build import make_network
from ..engine.catalogue import catalogue
from ..engine.devices import decode, settle, using
from ..engine.flags import training_flags
from ..engine.samples import SampleSettings, sample_latents, to_pil
from ..errors import AdapterError, AtelierError, JobError
from ..events import EventLog
from ..jsontext import parse
from ..maths import rng
from ..models.base import Model
from ..models.load import load_model
from ..models.room import give_back, let_go
from ..params.codec import load
from ..params.core import Task, Train
from ..params.job import Job
from ..ui.wish import Wish


class Easel:
    """Draws with the model used last still in main memory, so that a row of pictures loads it once. Between pictures
    nothing is on the device.
    """

    def __init__(self) -> None:
        self._held: tuple[tuple[object, ...], Model] | None = None

    def clear(self) -> None:
        """Forget the model, before a training needs the memory."""
        self._held = None
        give_back()

    def draw(self, wish: Wish, lora: Path | None, task: Task, device: torch.device) -> Image.Image:
        """The picture of a wish with the files of a task (paths). Raises AtelierError for those that cannot be used,
        and MemoryShortageError.
        """
        try:
            with training_flags(device), shortage.phase(shortage.PICTURE, device):
                loaded = self._model(wish, task, device)
                with _worn(loaded, lora, wish.strength):
                    settings = SampleSettings(wish.size, wish.steps, wish.cfg, wish.seed, clip_skip=wish.clip_skip)
                    return _picture(loaded, wish, settings)
        except BaseException as error:
            let_go(error)
            raise
        finally:
            if self._held is not None:
                settle(self._held[1])
            give_back()

    def _model(self, wish: Wish, task: Task, device: torch.device) -> Model:
        path, vae = Path(task.model), Path(task.vae) if task.vae else None
        texts = tuple(Path(name) for name in task.te.split(";") if name)
        key = (path, path.stat().st_mtime_ns, vae, texts, wish.v_pred, wish.zero_snr, device)
        if self._held is None or self._held[0] != key:
            self._held = None
            storage = torch.float16 if device.type == "cuda" else None
            model = load_model(path, vae_path=vae, text_paths=texts, v_pred=wish.v_pred, storage=storage, device=device)
            if wish.zero_snr:
                model.process = model.process.ending_in_noise()
            self._held = (key, model)
        return self._held[1]


@torch.no_grad()
def _picture(model: Model, wish: Wish, settings: SampleSettings) -> Image.Image:
    with using(model, *model.text_encoders):
        rows = model.encode_prompts([wish.prompt, wish.negative], settings.clip_skip)
    height, width = (edge // model.latent_factor for edge in wish.size)
    noise = rng.normal((model.latent_channels, height, width), "sample", wish.seed, 0, [0]).to(model.device)
    with using(model, model.unet):
        latents = sample_latents(model, rows[:1], rows[1:], noise, settings)
    with using(model, model.vae):
        return to_pil(decode(model, latents).float().cpu()[0])


@contextlib.contextmanager
def _worn(model: Model, lora: Path | None, strength: float) -> Iterator[None]:
    """The model with a LoRA attached."""
    if lora is None or not strength:
        yield
        return
    network = network_of(lora, model)
    network.to(model.device)
    network.attach()
    try:
        with network.at_strength(strength):
            yield
    finally:
        network.eject()


def network_of(path: Path, model: Model) -> Network:
    """The adapter in a LoRA file, for `model`, not yet attached. Raises AdapterError when it does not fit it.

    A file of ours says what it is; in others only plain LoRA is recognised, by its tensors.
    """
    tensors, metadata = read_any(path)
    jobs = [job for job in (_own_job(metadata), _plain_job(tensors)) if job is not None]
    if not jobs:
        raise AdapterError(
            f"{path.name} is a kind of LoRA that images cannot be generated with here. Use a WebUI for it."
        )
    faults: list[AtelierError] = []
    for job in jobs:
        try:
            network = make_network(job.replace(network_resume=""), model, 0, EventLog())
            network.load(tensors, baked=1.0)  # drawn as a WebUI draws it: the strength in the file stays in
            return network
        except AtelierError as fault:
            faults.append(fault)
    raise AdapterError(f"{path.name} cannot generate images: {faults[0]}") from faults[0]


def as_trained(wish: Wish, lora: Path) -> Wish:
    """The wish with the prediction type, schedule and clip skip of the job of a LoRA of ours, and with the names of its
    text encoder and VAE where the wish has none.
    """
    job = _own_job(read_lora(lora)[1])
    if job is None:
        return wish
    task, train = job[Task], job[Train]
    return replace(
        wish,
        v_pred=train.model_v_pred,
        zero_snr=train.model_zero_terminal_snr,
        clip_skip=train.train_clip_skip,
        te=wish.te or task.te,
        vae=wish.vae or task.vae,
    )


def _own_job(metadata: Mapping[str, str]) -> Job | None:
    try:
        return load(parse(metadata.get(JOB_KEY, "null")), catalogue(), complete=False).job
    except (JobError, ValueError):
        return None


def _plain_job(tensors: Mapping[str, torch.Tensor]) -> Job | None:
    """Settings of a plain LoRA of that rank on every layer; layers the file leaves out stay as they are."""
    layers = plain_layers(tensors)
    if layers is None:
        return None
    downs = [own[DOWN] for own in layers.values()]
    wide = [len(down) for down in downs if down.dim() == 4 and down.shape[-1] > 1]
    narrow = [len(down) for down in downs if down.dim() == 2 or down.shape[-1] == 1]
    raw = {
        "format": 1,
        "mode": "LoRA",
        "network_type": "c3lier" if wide else "lierla",
        "network_rank": (narrow or wide)[0],
        "network_conv_rank": wide[0] if wide else 0,
    }
    return load(raw, catalogue(), complete=False).job
