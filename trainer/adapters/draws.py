"""What adapters know of the moment: the random draws of a training step, a pure function of seed, micro batch, layer
and sample, and the timesteps of a prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths import rng
from ..maths.process import TIMESTEPS


class Draws:
    """What adapters draw in a training step; one object shared by all adapters of a network.

    Nothing is drawn outside a step (`on`): teachers, previews and files see the whole adapter. Within a micro batch a
    layer draws the same whenever it is called, so that gradient checkpointing repeats its own forward. Draws of samples
    are keyed by their place in the global batch: one process and several agree, and so does a resumed run.

    `rows`: how many prompts the text encoder was given at its last call; each may fill several rows of a batch.
    """

    __slots__ = ("_key", "_samples", "rows")

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self._samples: tuple[int, ...] = (0,)
        self.rows = 0

    @property
    def on(self) -> bool:
        """Whether a training step is being computed."""
        return self._key is not None

    def begin(self, seed: int, index: int, samples: Sequence[int]) -> None:
        """A step begins: micro batch `index`, of whose global batch this process has the places `samples`."""
        self._key, self._samples = (seed, index), tuple(samples)

    def end(self) -> None:
        """The step is over."""
        self._key = None

    def generator(self, *what: int | str) -> torch.Generator:
        """A CPU generator for one purpose in this step."""
        return rng.generator("adapter draws", *(self._key or ()), *what)

    def happens(self, chance: float, *what: int | str) -> bool:
        """True with this chance; equal for all samples and processes."""
        return chance > 0 and float(torch.rand((), generator=self.generator(*what))) < chance

    def kept(self, shape: Sequence[int], chance: float, *what: int | str) -> Tensor:
        """A dropout mask, 0 or 1/(1 − chance), float32 on the CPU; equal for all samples and processes."""
        return _mask(shape, chance, self.generator(*what))

    def kept_rows(self, like: Tensor, chance: float, is_text: bool, *what: int | str) -> Tensor:
        """A dropout mask shaped like a batch (rows, …), in its precision and on its device, drawn for each sample.

        Rows are the samples in order, as often as the mode repeats them; a prompt's chunks are rows of their own.
        """
        chunks = len(like) // self.rows if is_text and self.rows else 1
        masks = []
        for row in range(len(like)):
            whole, chunk = divmod(row, max(1, chunks))
            again, place = divmod(whole, len(self._samples))
            stream = self.generator(*what, again, self._samples[place], chunk)
            masks.append(_mask(like.shape[1:], chance, stream))
        return torch.stack(masks).to(like)


class Timesteps:
    """At which timesteps the base model predicts just now; one object shared by all adapters of a network.

    `value`: (B,) as settings count them, None outside of predictions and for texts. `kept`: masks made for it, so
    that not every layer makes its own.
    """

    __slots__ = ("kept", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.kept: dict[tuple[int, int], Tensor] = {}

    def change(self, timesteps_B: Tensor | None) -> None:
        """Another prediction begins, or it ends."""
        self.value, self.kept = timesteps_B, {}

    def mask(self, rank: int, lowest: int) -> Tensor | None:
        """(B, rank) of 0 and 1: the first r(t) ranks of each sample, r(t) = r_min + ⌊(r − r_min)·(T − t)/T⌋ (T-LoRA,
        2507.05964).

        None outside of predictions.
        """
        if self.value is None:
            return None
        if (rank, lowest) not in self.kept:
            more = ((rank - lowest) * (TIMESTEPS - self.value)).div(TIMESTEPS, rounding_mode="floor")
            active = lowest + more  # exact: whole numbers below 2²⁴ at whole timesteps
            self.kept[rank, lowest] = (torch.arange(rank, device=active.device) < active[:, None]).float()
        return self.kept[rank, lowest]


def _mask(shape: Sequence[int], chance: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(*shape, generator=generator) >= chance).float() / (1 - chance)
