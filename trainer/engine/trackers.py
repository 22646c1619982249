"""TensorBoard and Weights & Biases as listeners: losses, rates, mean absolute adapter weight per part, sample
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..errors import MissingPackageError
from ..events import Event, Sampled, Step
from .losses import READ_EVERY

Weights = Callable[[], Mapping[str, Any]]


class Tracker(Protocol):
    """Where numbers and pictures of a run go besides our own log."""

    def __call__(self, event: Event) -> None:
        """Take note of an event."""

    def close(self) -> None:
        """Write what is pending."""


def _scalars(event: Step, weights: Weights) -> dict[str, float]:
    values = {"loss": event.loss, "loss_ema": event.loss_ema}
    values.update({f"learning_rate/{n + 1}": rate for n, rate in enumerate(event.rates)})
    if event.step % READ_EVERY == 0:
        values.update({f"mean_abs_weight/{part}": float(value) for part, value in weights().items()})
    return values


class TensorBoard:
    """Event files in `<run folder>/tensorboard`."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, object], weights: Weights) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError("logging_trackers = tensorboard", "tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._weights = weights

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        import numpy as np

        if isinstance(event, Step):
            for key, value in _scalars(event, self._weights).items():
                self._writer.add_scalar(key, value, event.step)
        elif isinstance(event, Sampled):
            for index, path in enumerate(event.paths):
                with Image.open(path) as picture:
                    self._writer.add_image(f"sample/{index}", np.asarray(picture), event.step, dataformats="HWC")

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class WandB:
    """A run in the project `atelier`; files stay in the run folder when WANDB_MODE=offline."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, object], weights: Weights) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError("logging_trackers = wandb", "wandb") from error
        self._wandb: Any = wandb
        self._run: Any = wandb.init(project="atelier", name=name, dir=str(folder), config=dict(settings))
        self._weights = weights

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Step):
            self._run.log(_scalars(event, self._weights), step=event.step)
        elif isinstance(event, Sampled):
            pictures = [self._wandb.Image(path) for path in event.paths]
            self._run.log({"samples": pictures}, step=event.step)

    def close(self) -> None:
        """Write what is pending."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, object], Weights], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
