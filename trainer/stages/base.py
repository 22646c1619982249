"""What a stage is: something a job may add before its first step (an initialisation) or to every step (a penalty)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..modes.base import Preparation, Settings
from ..params.rules import Rule
from ..registry import Registry

__all__ = ["STAGES", "Preparation", "Stage"]


class Stage(ABC):
    """Base of all stages. `needs` are the tags of the parameters it adds to every form, `sections` the parameter
    classes it declares, `rules` what must hold for them. Stages of a higher `turn` come after the others.
    """

    turn: ClassVar[int] = 0
    help: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    sections: ClassVar[tuple[type, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def wanted(cls, settings: Settings) -> bool:
        """Whether the job asks for this stage."""

    @property
    def rows(self) -> int:
        """Samples it differentiates at once beside a step's own, which decide the memory where they are more."""
        return 0

    def prompts(self) -> tuple[str, ...]:
        """Prompts whose conditioning it will ask the kit for."""
        return ()

    def prepare(self, at: Preparation) -> None:  # noqa: B027 (most have nothing to do)
        """Runs once before the first step; changes parameters and buffers of the adapter in place only.

        Several processes go on with what the leading one has then.
        """

    def step(self, network: Any, done: int, total: int) -> None:  # noqa: B027
        """Runs before every optimizer step; `done` of `total` steps are behind it."""

    def penalty(self, network: Any) -> Tensor | None:
        """A 0-d tensor, differentiable in the adapter, that is added to the loss of every optimizer step."""
        return None


STAGES: Registry[type[Stage]] = Registry("stage", "stages")
