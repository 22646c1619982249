"""What AUTOMATIC1111's WebUI and its descendants have in common: the lock, lending their model, drawing, the login."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engine.arguments import precision, text_files
from ..errors import AtelierError, BusyError, NotAdoptable
from ..events import EventLog
from ..models.base import Model
from ..models.live import Live, adopt, copied_bytes
from ..models.room import give_back, same_device
from ..params.core import Task, Train
from ..params.job import Job
from .access import gradio_lets_in
from .folders import Folders
from .names import same_file

SAMPLER = "Euler"


class WebUI(Folders):
    """A WebUI of the AUTOMATIC1111 kind. Its modules are imported when they are needed, never at the start."""

    prompt_box = "#txt2img_prompt textarea"

    def __init__(self) -> None:
        self._lent = False

    # ---------------------------------------------------------------- what one WebUI has and another has not

    @abstractmethod
    def lay_bare(self, restore: ExitStack) -> Live:
        """The loaded model as plain tensors, the last picture's LoRA taken out and all models moved off the device.

        What has to be undone at the end goes into `restore`. Raises NotAdoptable.
        """

    @abstractmethod
    def draws_on(self) -> torch.device | str | None:
        """The device the WebUI draws on, from its own record; None before it has chosen one."""

    @abstractmethod
    def make_room(self, restore: ExitStack) -> None:
        """Move all models off the device, because another one is going to be trained."""

    # ---------------------------------------------------------------- lending

    def device(self) -> torch.device | None:
        """The device the WebUI draws on; None, which stands for the best there is, where it cannot be asked."""
        try:
            found = self.draws_on()
            return None if found is None else torch.device(found)
        except (ImportError, AttributeError, RuntimeError, TypeError):  # a WebUI that is not as we know it
            return None

    @contextmanager
    def borrow(self, job: Job, log: EventLog) -> Iterator[Model | None]:
        """Lend the GPU and, where possible, the loaded model; the WebUI's own lock makes drawing wait until the end."""
        from modules import call_queue

        lock = call_queue.queue_lock
        if not lock.acquire(False):
            log.note(f"Waiting until {self.name} has finished generating.")
            lock.acquire()
        try:
            self._lent = True
            with ExitStack() as restore:
                try:
                    model = self._adopted(job, log, restore)
                    if model is None:
                        self.make_room(restore)
                finally:
                    restore.callback(give_back)  # entered last, done first: before models of the WebUI come back
                try:
                    yield model
                finally:
                    del model
        finally:
            self._lent = False
            lock.release()

    def _adopted(self, job: Job, log: EventLog, restore: ExitStack) -> Model | None:
        """The loaded model in modules of our own; None, with the reason in the log, when its file has to be read."""
        wanted, loaded = Path(job[Task].model), self.loaded_path()
        if loaded is None or not same_file(wanted, loaded):
            log.note(f"{wanted.name} is not loaded in {self.name}: it is read from its file.")
            return None
        try:
            with ExitStack() as attempt:
                live = self.lay_bare(attempt)
                model = self._own_modules(job, live)
                restore.push(attempt.pop_all())
        except NotAdoptable as reason:
            log.warn(f"The model loaded in {self.name} is read from its file: {reason}.")
            return None
        except AtelierError:
            raise
        except Exception as error:  # a WebUI that is not as we know it must not keep anyone from training
            log.warn(f"The model loaded in {self.name} is read from its file: {type(error).__name__}: {error}.")
            return None
        self._tell(model, live, job, log)
        return model

    def _own_modules(self, job: Job, live: Live) -> Model:
        task, train = job[Task], job[Train]
        vae, loaded = Path(task.vae) if task.vae else None, self.loaded_vae()
        in_use = vae is None or (loaded is not None and same_file(vae, loaded))
        texts, theirs = [Path(name) for name in text_files(job)], self.loaded_texts()
        new = [path for path in texts if not any(same_file(path, other) for other in theirs)]
        return adopt(
            live,
            v_pred=train.model_v_pred,
            storage=precision(train.train_model_precision, "train_model_precision"),
            vae_path=None if in_use else vae,
            text_paths=new,
            vae_storage=precision(train.train_VAE_precision, "train_VAE_precision"),
            device=self.device(),
            vocabularies=self.vocabularies(),
        )

    def _tell(self, model: Model, live: Live, job: Job, log: EventLog) -> None:
        copied = copied_bytes(model, live)
        asked = job[Train].train_model_precision
        log.note(f"Training on the model loaded in {self.name}: {live.path.name}, not read again, on {model.device}.")
        theirs = self.device()
        if theirs is not None and not same_device(model.device, theirs):
            log.warn(
                f"{self.name} generates on {theirs}, but this training computes on {model.device}, which can be far "
                f"slower. Please report it with the version of {self.name}."
            )
        if copied >= 2**20:
            log.note(
                f"{copied / 2**20:.0f} MB of it were copied, to hold them in train_model_precision = {asked} and "
                f"train_VAE_precision = {job[Train].train_VAE_precision}. With both set to model nothing is copied."
            )
        for line in model.warnings:
            log.warn(line)

    # ---------------------------------------------------------------- drawing

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """A picture by the WebUI's own txt2img, with its current model. Raises BusyError while that is lent."""
        if self._lent:
            raise BusyError(f"{self.name} is training. Generate when the training is finished, or stop it first.")
        from modules import call_queue, processing, scripts, shared

        with call_queue.queue_lock:
            shared.state.begin(job="atelier")
            try:
                process = processing.StableDiffusionProcessingTxt2Img(
                    sd_model=shared.sd_model,
                    prompt=prompt,
                    negative_prompt=negative,
                    seed=seed,
                    height=size[0],
                    width=size[1],
                    steps=steps,
                    cfg_scale=cfg,
                    sampler_name=SAMPLER,
                    do_not_save_samples=True,
                    do_not_save_grid=True,
                )
                process.scripts = scripts.ScriptRunner()  # of no scripts: reForge looks into it without asking for one
                with closing(process):
                    return processing.process_images(process).images[0]
            finally:
                shared.state.end()

    def refresh_loras(self) -> None:
        """Make the WebUI's LoRA extension list its folder again."""
        networks = sys.modules.get("networks")  # the extension's own module; absent when it is switched off
        if networks is not None and hasattr(networks, "list_available_networks"):
            networks.list_available_networks()

    def authorised(self, request: Any) -> bool:
        """Whether the WebUI's login let the sender in, by cookie or by --api-auth."""
        pairs = str(self.option("api_auth", "")).split(",")
        return gradio_lets_in(request, [pair for pair in map(str.strip, pairs) if ":" in pair])
