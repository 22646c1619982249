"""Difference, the copy machine: one adapter learns a picture by heart, the next one, on top of it, what another has
more.

The first pass trains an adapter on the original picture until the model draws hardly anything else. It stays on,
frozen at strength 1, while the second pass trains the adapter that is kept on the target picture: all that both
pictures share is explained already, so it learns their difference.
"""

from __future__ import annotations

from ..params.core import Train
from ..params.field import ModeInfo
from ..params.job import Job
from ..params.rules import Rule
from .base import MODES, Pass
from .lora import LoRA


def one_model(job: Job, mode: ModeInfo) -> str:
    """A second pass on the base model in another form."""
    if job.second is None:
        return ""
    names = ("train_model_precision", "train_VAE_precision", "model_v_pred", "model_zero_terminal_snr")
    other = [name for name in names if getattr(job.second[Train], name) != getattr(job[Train], name)]
    if not other:
        return ""
    return f"is loaded once: the second pass keeps the first one's {', '.join(other)}."


@MODES.register("Difference")
class Difference(LoRA):
    """Learns the difference of two pictures in two passes."""

    help = (
        "Overfits one image first, then learns the other on top of it: only the difference remains. An empty target"
        " prompt takes the original one."
    )
    needs = frozenset({"prompts", "pictures", "trigger", "resume", "first_pass", "second", "te_train", "run"})
    second = frozenset({"te_train"})
    rules = (Rule(("train_model_precision", "mode"), one_model, warning=True),)

    @classmethod
    def passes(cls) -> tuple[Pass, ...]:
        """The copy of the original, then the target on top of it."""
        return Pass("original", "_copy"), Pass("target")
