"""What a mode is: a name, what it shows of the form, where its batches come from, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from ..contracts import Layer
from ..maths.process import NoiseProcess
from ..params.core import Train
from ..params.rules import Rule
from ..registry import Registry


@dataclass(frozen=True)
class Batch:
    """What one process computes of one global micro batch.

    `index` counts micro batches from 0 over the whole run. `samples` are the positions of this process's samples
    inside the global batch (they key the random draws), `share` is the size of the global batch. `mean`/`std` are the
    VAE
    posterior of the pictures, scaled, (B, C, H, W); zeros for modes without pictures. `time_ids` (B, 6) is SDXL's size
    conditioning in
    pixels.
    `prompts` are the captions or original prompts, `targets` the target prompts of modes that have them. `target_mean`
    and `target_std` are the posterior of the second picture of a pair; `mask` (B, 1, H, W) says where the two differ.
    """

    index: int
    samples: tuple[int, ...]
    share: int
    prompts: tuple[str, ...]
    mean: Tensor
    std: Tensor
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    targets: tuple[str, ...] = ()
    target_mean: Tensor | None = None
    target_std: Tensor | None = None


class Kit(Protocol):
    """The verbs a mode may use."""

    process: NoiseProcess

    @property
    def per_sample(self) -> bool:
        """Whether one forward may have another strength for each sample."""

    def latents(self, batch: Batch) -> Tensor:
        """Latents drawn from the pictures' posterior, (B, C, H, W)."""

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents of both pictures of the batch's pairs, (B, C, H, W) each, from the same draw of their posteriors."""

    def noise(self, batch: Batch, fixed: bool = False, purpose: str = "noise") -> Tensor:
        """Standard normal noise, one keyed stream per sample and purpose, (B, C, H, W); `fixed` gives the same in every
        step.
        """

    def timesteps(self, batch: Batch, strata: int = 1) -> Tensor:
        """Times in the job's range of timesteps, (B,); of every `strata` consecutive samples one in each part of it."""

    def text(self, prompts: Sequence[str]) -> Any:
        """The conditioning of prompts, one row each: encoded at the current strength when the text encoder is
        trained.
        """

    def predict(self, x_BCHW: Tensor, t_B: Tensor, conditioning: Any, time_ids: Tensor | None = None) -> Tensor:
        """The model's prediction at x_t with the adapter at its current strength."""

    def rollout(self, batch: Batch, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """States of the untouched model's own sampling of the batch's prompts in `steps` steps, without guidance.

        (x_t (B, C, H, W), t (B,), its prediction there) for every step in the job's range of timesteps, noisiest first.
        """

    def strength(self, value: float | Tensor) -> AbstractContextManager[None]:
        """The adapter at another strength inside the block; a tensor (B,) is one strength per sample."""

    def teacher(self) -> AbstractContextManager[None]:
        """The untouched model inside the block: strength 0, no gradient."""

    def loss(self, predicted: Tensor, target: Tensor, t_B: Tensor, mask: Tensor | None = None) -> Tensor:
        """The job's distance with its weights, per sample, (B,)."""


T = TypeVar("T")


class Settings(Protocol):
    """A job as a mode sees it: its sections by class."""

    def __getitem__(self, section: type[T]) -> T:
        """The values of a section."""


def _no_descent(rate: float) -> Callable[[Tensor], None]:
    raise TypeError("this preparation was made without a network to train")


@dataclass(frozen=True)
class Preparation:
    """What stages and modes work with before the first step, the adapter attached.

    `batch(i)` gives this process's part of the i-th micro batch, `tell` writes a line into the log, `stopping` says
    whether the user wants the run to end, `progress(name, done, total)` shows how far something long is, `loss(batch)`
    is the mode's, per sample. A `resumed` run restores its parameters and buffers after the stages. `descent(rate)`
    gives a function that takes one AdamW step on the adapter down a loss (0-d), for a training before the training.
    """

    network: Any
    model: Any
    kit: Kit
    batch: Callable[[int], Batch | None]
    tell: Callable[[str], None]
    seed: int
    loss: Callable[[Batch], Tensor]
    resumed: bool = False
    stopping: Callable[[], bool] = lambda: False
    progress: Callable[[str, int, int], None] = lambda name, done, total: None
    descent: Callable[[float], Callable[[Tensor], None]] = _no_descent


@dataclass(frozen=True)
class Pass:
    """One training of a mode that has several, one after the other, each on top of the frozen adapters of those before.

    `source`: where its batches come from. `suffix`: what the names of its file and log have more than the job's.
    """

    source: str
    suffix: str = ""


class Mode:
    """Base of all modes. `needs` are the tags of parameters its form shows, `sections` the parameter classes it
    declares itself, `rules` what must hold for them. `second`: the tags of its second pass, None when it has none.
    `by_traintrain`: the class that trains by TrainTrain's rule, where that is another. `steps`: whether it trains by
    optimizer steps; one that does not writes its result in `prepare`, into an adapter of its own `rank` on the layers
    it `covers`.
    """

    help: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    sections: ClassVar[tuple[type, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    second: ClassVar[frozenset[str] | None] = None
    source: ClassVar[str] = "pictures"
    steps: ClassVar[bool] = True
    by_traintrain: ClassVar[type[Mode] | None] = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    def of(cls, settings: Settings) -> Mode:
        """This mode for a job: with TrainTrain's own rule where the job asks for it and the mode has one."""
        MODES.scan()
        kind = cls.by_traintrain if settings[Train].train_traintrain_compatible else None
        return (kind or cls)(settings)

    @classmethod
    def passes(cls) -> tuple[Pass, ...]:
        """Its trainings in order; the last one's adapter is the result."""
        return (Pass(cls.source),)

    def prompts(self) -> tuple[str, ...]:
        """Prompts this mode asks for beside those of its batches."""
        return ()

    def anchors(self) -> tuple[str, ...]:
        """Prompts whose prediction must stay: every second row of the batches of a mode that learns from prompts."""
        return ()

    def covers(self, layer: Layer) -> bool:
        """Whether its adapter may sit on this layer."""
        return True

    def rank(self, model: Any) -> int:
        """The rank of the adapter of a mode without steps on this model."""
        raise TypeError(f"{type(self).__name__} takes the rank of the job")

    def prepare(self, at: Preparation) -> None:
        """Runs once before the stages and the first step; the adapter has no effect yet, unless it is continued."""

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """Loss per sample, (B,), differentiable in the adapter."""
        raise TypeError(f"{type(self).__name__} does not say what its loss is")


MODES: Registry[type[Mode]] = Registry("mode", "modes")
