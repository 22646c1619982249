"""What AUTOMATIC1111's WebUI and its descendants have in common: lists, folders, the lock, drawing, the login."""

from __future__ import annotations

import gc
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engine.arguments import precision, text_files
from ..errors import AtelierError, Problem
from ..events import EventLog
from ..models.base import Model
from ..models.live import Live, NotAdoptable, adopt, copied_bytes
from ..params.core import Task, Train
from ..params.job import Job
from ..places import Places
from .access import gradio_lets_in, is_loopback
from .base import BusyError
from .names import find, problems_to_error

SAMPLER = "Euler"


class WebUI(ABC):
    """A WebUI of the AUTOMATIC1111 kind. Its modules are imported when they are needed, never at the start."""

    name = "WebUI"
    prompt_box = "#txt2img_prompt textarea"

    def __init__(self) -> None:
        self._lent = False

    # ---------------------------------------------------------------- what one WebUI has and another has not

    @abstractmethod
    def loaded_path(self) -> Path | None:
        """The file of the model that is loaded now."""

    def selected_path(self) -> Path | None:
        """The file of the model that is chosen in the WebUI, loaded or not yet."""
        return self.loaded_path()

    @abstractmethod
    def loaded_vae(self) -> Path | None:
        """The file of the VAE that replaces the model's own at the moment."""

    @abstractmethod
    def lay_bare(self, restore: ExitStack) -> Live:
        """The loaded model as plain tensors, the last picture's LoRA taken out and other models moved off the device.

        What has to be undone at the end goes into `restore`. Raises NotAdoptable.
        """

    @abstractmethod
    def make_room(self, restore: ExitStack) -> None:
        """Move all models off the device, because another one is going to be trained."""

    def vocabularies(self) -> tuple[Path, ...]:
        """Folders with CLIP's vocabulary that this WebUI brings."""
        return ()

    # ---------------------------------------------------------------- folders and lists

    def option(self, name: str, default: Any = None) -> Any:
        """A command line option of the WebUI; the default where this one does not know it."""
        from modules import shared

        value = getattr(shared.cmd_opts, name, None)
        return default if value in (None, "") else value

    @property
    def listens_beyond_loopback(self) -> bool:
        """Whether the WebUI was started for others than this machine."""
        if self.option("share", False) or self.option("ngrok") or self.option("listen", False):
            return True
        return not is_loopback(self.option("server_name", "127.0.0.1"))

    @property
    def data_root(self) -> Path | None:
        """The folder given with --atelier-data-root."""
        root = self.option("atelier_data_root")
        return Path(root) if root else None

    def places(self) -> Places:
        """The WebUI's folders for models; ours for everything else."""
        from modules import paths, sd_models

        models = Path(paths.models_path)
        return Places(
            loras=Path(self.option("lora_dir", models / "Lora")),
            checkpoints=Path(self.option("ckpt_dir", sd_models.model_path)),
            vaes=Path(self.option("vae_dir", models / "VAE")),
            text_encoders=models / "text_encoder",
            vocabularies=self.vocabularies(),
        )

    def checkpoints(self) -> tuple[str, ...]:
        """The WebUI's list, by names that stay the same when it computes a hash."""
        from modules import sd_models

        return tuple(sorted({info.name for info in list(sd_models.checkpoints_list.values())}, key=str.lower))

    def vaes(self) -> tuple[str, ...]:
        """The WebUI's VAE files."""
        from modules import sd_vae

        return tuple(sorted(sd_vae.vae_dict))

    def text_encoders(self) -> tuple[str, ...]:
        """The WebUI's separate text encoders."""
        return ()

    def refresh(self) -> None:
        """Make the WebUI look for new models."""
        from modules import sd_models, sd_vae

        sd_models.list_models()
        sd_vae.refresh_vae_list()

    def loaded_model(self) -> str | None:
        """The name of the loaded or else selected model."""
        path = self.loaded_path() or self.selected_path()
        return None if path is None else self._name_of(path)

    def _name_of(self, path: Path) -> str:
        from modules import sd_models

        infos = list(sd_models.checkpoints_list.values())
        return next((str(info.name) for info in infos if Path(info.filename) == path), str(path))

    def resolve(self, job: Job) -> Job:
        """The job with full paths for model and VAE; an empty model is the loaded one. Raises JobError."""
        from modules import sd_models, sd_vae

        task, problems = job[Task], []
        here = self.loaded_path() or self.selected_path()
        theirs: Callable[[str], str | None] = lambda name: getattr(  # noqa: E731
            sd_models.checkpoint_aliases.get(name), "filename", None
        )
        folders, model, vae = self.places(), "", ""
        if task.model:
            model = find(task.model, "model", folders.checkpoints, problems, theirs)
        elif here is None:
            problems.append(Problem("model", "", f"no model is loaded in {self.name}. Choose one."))
        else:
            model = str(here)
        if task.vae:
            vae = find(task.vae, "vae", folders.vaes, problems, self._vae_files(sd_vae).get)
        elif (loaded := self.loaded_vae()) is not None:
            vae = str(loaded)
        names = text_files(job)
        texts = [find(name, "te", folders.text_encoders, problems, self._text_files().get) for name in names]
        if not names and here is not None and model and _same_file(Path(model), here):
            texts = [str(path) for path in self.loaded_texts()]
        problems_to_error(problems)
        return job.replace(model=model, vae=vae, te=";".join(texts))

    def _vae_files(self, sd_vae: Any) -> dict[str, str]:
        return dict(sd_vae.vae_dict)

    def _text_files(self) -> dict[str, str]:
        """Name → path of the text encoder files the WebUI knows."""
        return {}

    def loaded_texts(self) -> tuple[Path, ...]:
        """The text encoder files that are in use beside the model's own; not every WebUI can do that."""
        return ()

    # ---------------------------------------------------------------- lending

    @contextmanager
    def borrow(self, job: Job, log: EventLog) -> Iterator[Model | None]:
        """Lend the GPU and, where possible, the loaded model; the WebUI's own lock makes drawing wait until the end."""
        from modules import call_queue

        lock = call_queue.queue_lock
        if not lock.acquire(False):
            log.note(f"Waiting until {self.name} has finished what it is drawing.")
            lock.acquire()
        try:
            self._lent = True
            with ExitStack() as restore:
                restore.callback(self._tidy)
                model = self._adopted(job, log, restore)
                if model is None:
                    self.make_room(restore)
                yield model
                del model
        finally:
            self._lent = False
            lock.release()

    def _tidy(self) -> None:
        """Give freed memory back to the device."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _adopted(self, job: Job, log: EventLog, restore: ExitStack) -> Model | None:
        """The loaded model in modules of our own; None, with the reason in the log, when its file has to be read."""
        wanted, loaded = Path(job[Task].model), self.loaded_path()
        if loaded is None or not _same_file(wanted, loaded):
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
        in_use = vae is None or (loaded is not None and _same_file(vae, loaded))
        texts, theirs = [Path(name) for name in text_files(job)], self.loaded_texts()
        new = [path for path in texts if not any(_same_file(path, other) for other in theirs)]
        return adopt(
            live,
            v_pred=train.model_v_pred,
            storage=precision(train.train_model_precision, "train_model_precision"),
            vae_path=None if in_use else vae,
            text_paths=new,
            vae_storage=precision(train.train_VAE_precision, "train_VAE_precision"),
            vocabularies=self.vocabularies(),
        )

    def _tell(self, model: Model, live: Live, job: Job, log: EventLog) -> None:
        copied = copied_bytes(model, live)
        asked = job[Train].train_model_precision
        log.note(f"Training on the model loaded in {self.name}: {live.path.name}, not read again.")
        if copied >= 2**20:
            log.note(
                f"{copied / 2**20:.0f} MB of it were copied: train_model_precision is {asked}, train_VAE_precision "
                f"{job[Train].train_VAE_precision}; model keeps what is loaded."
            )
        for line in model.warnings:
            log.warn(line)

    # ---------------------------------------------------------------- drawing

    def txt2img(self, prompt: str, negative: str, seed: int, size: tuple[int, int], steps: int, cfg: float) -> Any:
        """A picture by the WebUI's own txt2img, with its current model. Raises BusyError while that is lent."""
        if self._lent:
            raise BusyError(f"{self.name} is training. Draw when the training is finished, or stop it first.")
        from modules import call_queue, processing, shared

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


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other
