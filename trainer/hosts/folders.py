"""Folders, lists and names of AUTOMATIC1111's WebUI and its descendants: what there is to train, and where it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.arguments import text_files
from ..errors import Problem
from ..params.core import Task
from ..params.job import Job
from ..places import Places
from .access import is_loopback
from .names import find, problems_to_error, same_file


class Folders(ABC):
    """What a WebUI knows of models. Its modules are imported when they are needed, never at the start."""

    name = "WebUI"

    @abstractmethod
    def loaded_path(self) -> Path | None:
        """The file of the model that is loaded now."""

    def selected_path(self) -> Path | None:
        """The file of the model that is chosen in the WebUI, loaded or not yet."""
        return self.loaded_path()

    @abstractmethod
    def loaded_vae(self) -> Path | None:
        """The file of the VAE that replaces the model's own at the moment."""

    def vocabularies(self) -> tuple[Path, ...]:
        """Folders with CLIP's vocabulary that this WebUI brings."""
        return ()

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

        task = job[Task]
        problems: list[Problem] = []
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
        if not names and here is not None and model and same_file(Path(model), here):
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
