"""Instant map: words are given another meaning by solving for the change of the cross-attention, without any training.

UCE (2308.14761) weighs edited against preserved words; SPEED (2503.07392) leaves the preserved ones exactly as they
are (of it the constraint and the choice of what to preserve, not the noisy copies of preserved words). Both results are
low-rank as they stand, so that the file is an ordinary LoRA and exact. SDXL's pooled text does not pass through
cross-attention and keeps its old meaning.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Layer, Placed, Role
from ..errors import AdapterError, JobError, Problem
from ..maths import concept
from ..maths.weights import weight_of
from ..params.core import Task
from ..params.field import ModeInfo, param
from ..params.job import Job
from ..params.rules import Rule
from .base import MODES, Batch, Kit, Mode, Preparation, Settings
from .prompts import RULES, prompt_pairs, unrelated, written_lines

PRESERVED = (
    "a photo", "a painting", "a person", "a man", "a woman", "a child", "a face", "an animal", "a cat", "a dog",
    "a bird", "a flower", "a tree", "a landscape", "a building", "a car", "food", "an object", "red", "green", "blue",
    "yellow", "black", "white",
)  # fmt: skip


@dataclass(frozen=True)
class InstantParams:
    """What the instant map adds to the table."""

    instant_method: str = param(
        "uce", "uce balances the change against the preserved prompts; speed preserves them exactly and changes less.",
        "option",
        needs="instant", choices=("uce", "speed"),
    )  # fmt: skip
    instant_preserve: str = param(
        "", "Prompts that must keep their meaning, one per line. Empty takes a built-in list of common words.",
        "option", needs="instant", holds="lines",
    )  # fmt: skip
    instant_ridge: float = param(
        0.01, "Regularisation: a higher value makes smaller changes. Relative to the size of the edited embeddings.",
        "option",
        needs="instant", low=1e-6, high=100,
    )  # fmt: skip


def edited(layer: Placed) -> bool:
    """Whether a layer, or the adapter on it, is one that is edited: keys and values of the UNet's cross-attention."""
    return layer.part == "unet" and layer.role in (Role.CROSS_K, Role.CROSS_V)


def preserved(settings: Settings, originals: Iterable[str]) -> tuple[str, ...]:
    """The prompts to preserve beside targets and the empty prompt; of the built-in ones those that share no word with
    what is edited.
    """
    given = written_lines(settings[InstantParams].instant_preserve)
    return given or unrelated(PRESERVED, originals)


def contradiction(job: Job, mode: ModeInfo) -> str:
    """A prompt that is both edited and preserved."""
    lines = {line.strip() for line in job[InstantParams].instant_preserve.splitlines()}
    both = sorted(lines & set(prompt_pairs(job)[0]) - {""})
    return f"holds {both[0]!r}, which is an original prompt; it cannot both change and stay." if both else ""


def nothing_to_edit(job: Job, mode: ModeInfo) -> str:
    """A line without a word, where there is nothing whose meaning could change."""
    if job[Task].mode != "Instant" or all(prompt_pairs(job)[0]):
        return ""
    return "has an empty line; an instant map changes the meaning of words, so name them."


@dataclass(frozen=True)
class Edit:
    """What the closed form needs, and what it gave: rows of embeddings and the down matrix, float32 on the CPU."""

    edited: Tensor
    wanted: Tensor
    kept: Tensor
    down: Tensor

    def factors(self, weight_OC: Tensor) -> tuple[Tensor, Tensor]:
        """(up (out, n), down (n, in)) of one layer: ΔW = W·(V − E)ᵀ·D."""
        moved = (self.wanted - self.edited).to(weight_OC.device)
        return weight_OC.detach().float() @ moved.T, self.down.to(weight_OC.device)


@MODES.register("Instant")
class Instant(Mode):
    """Solves instead of training."""

    help = "Changes the meaning of words in seconds, without images or training. An empty target removes it."
    needs = frozenset({"prompts", "instant", "run"})
    sections = (InstantParams,)
    rules = (
        *RULES,
        Rule(("instant_preserve", "original_prompt"), contradiction, complete=True),
        Rule(("original_prompt", "mode"), nothing_to_edit, complete=True),
    )
    source = "prompts"
    steps = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._pairs: tuple[tuple[str, ...], tuple[str, ...]] = prompt_pairs(settings)

    def prompts(self) -> tuple[str, ...]:
        """What is preserved."""
        return ("", *preserved(self.settings, self._pairs[0]))

    def covers(self, layer: Layer) -> bool:
        """Keys and values of the cross-attention."""
        return edited(layer)

    def rank(self, model: Any) -> int:
        """One for every edited embedding, at most their width."""
        spots = places(model.text_encoders[0].tokenizer.encode, *self._pairs)
        return min(len(spots), sum(int(encoder.clip.config.hidden_size) for encoder in model.text_encoders))

    def prepare(self, at: Preparation) -> None:
        """Solves for every layer and writes the result into the adapter."""
        began = time.perf_counter()
        edit = solve(self.settings, self._pairs, self.prompts(), at.kit, at.model)
        install(edit, at.network, at.tell)
        at.tell(
            f"{self.settings[InstantParams].instant_method.upper()}: {len(edit.edited)} embeddings edited, "
            f"{len(edit.kept)} preserved, {len(at.network)} layers in {time.perf_counter() - began:.2f} s."
        )

    def loss(self, kit: Kit, batch: Batch) -> Tensor:
        """There are no steps."""
        raise TypeError("an instant map has no loss")


def places(encode: Any, originals: Sequence[str], targets: Sequence[str]) -> list[tuple[int, int, int]]:
    """(line, position in the original, position in the target) of every edited embedding; −1 stands for the padding.

    Raises JobError when no line has a word that differs.
    """
    found = []
    for line, (original, target) in enumerate(zip(originals, targets, strict=True)):
        words = concept.partners(encode(original), encode(target))
        found += [(line, own, other) for own, other in (*words, *([(-1, -1)] if words else []))]
    if not found:
        message = "reads the same as the target prompt to this model's text encoder; write what it is to become."
        raise JobError([Problem("original prompt", "\n".join(originals), message)])
    return found


def solve(
    settings: Settings, pairs: tuple[Sequence[str], Sequence[str]], prompts: Sequence[str], kit: Kit, model: Any
) -> Edit:
    """The embeddings of the job's prompts and the down matrix all layers share. Raises JobError for long prompts."""
    own = settings[InstantParams]
    originals, targets = pairs
    reader = Embeddings(kit, model)
    spots = places(reader.encode, originals, targets)
    edited = torch.stack([reader.rows(originals[line])[position] for line, position, _ in spots])
    wanted = torch.stack([reader.rows(targets[line])[position] for line, _, position in spots])
    ridge = own.instant_ridge * float(edited.square().sum(1).mean())
    changed = {old for old, new in zip(originals, targets, strict=True) if old != new}
    still = [prompt for prompt in dict.fromkeys(("", *targets)) if prompt not in changed]  # in a swap none stays
    first = torch.cat([reader.rows(prompt) for prompt in still])
    others = torch.cat([reader.rows(prompt) for prompt in prompts]) if prompts else first[:0]
    kept = torch.cat([first, others])
    if own.instant_method == "uce":
        return Edit(edited, wanted, kept, concept.balanced(edited, kept, ridge).float())
    free = concept.influence(kept, concept.balanced(edited, kept[:1], ridge), wanted - edited)
    free[: len(first)] = torch.inf  # targets and the empty prompt come first
    kept = kept[concept.most_moved(kept, free, edited.shape[1] // 2)]
    return Edit(edited, wanted, kept, concept.constrained(edited, kept, ridge).float())


class Embeddings:
    """What cross-attention reads of prompts: start, words, end, and the mean of the padding as the last row."""

    def __init__(self, kit: Kit, model: Any) -> None:
        self._kit, self._window = kit, model.window
        self.encode = model.text_encoders[0].tokenizer.encode
        self._known: dict[str, Tensor] = {}

    def rows(self, prompt: str) -> Tensor:
        """(words + 3, in) float32 on the CPU. Raises JobError for a prompt longer than the window."""
        if prompt not in self._known:
            words = len(self.encode(prompt))
            room = self._window - 2
            if words > room:
                message = f"{prompt[:40]!r}… has {words} tokens, an instant map takes {room} at most; shorten it."
                raise JobError([Problem("original prompt", prompt, message)])
            with torch.no_grad():
                context = self._kit.text([prompt]).context_BLD[0].float().cpu()
            filled = words + 2
            padding = context[filled:] if filled < len(context) else context[filled - 1 :]
            self._known[prompt] = torch.cat([context[:filled], padding.mean(0, keepdim=True)])
        return self._known[prompt]


@torch.no_grad()
def install(edit: Edit, network: Any, tell: Any) -> None:
    """Write an edit into the adapters of the cross-attention's keys and values; others stay as they are.

    An adapter of smaller rank gets the best approximation on the embeddings at hand, one of larger rank keeps its
    random start in the rest. Raises AdapterError when the network has no such adapter.
    """
    chosen = [adapter for adapter in network if edited(adapter) and "instant" in adapter.inits]
    if not chosen:
        raise AdapterError(
            "network_init instant: no key or value layer of the cross-attention has a plain LoRA. Choose network_type "
            "lierla or c3lier, and network_element Full or CrossAttention."
        )
    rows = torch.cat([edit.edited, edit.kept])
    worst = 1.0
    for adapter in chosen:
        up, down = (factor.cpu() for factor in edit.factors(weight_of(adapter.module)))
        if len(down) > down.shape[1]:  # more embeddings than dimensions
            up, down = up @ down, torch.eye(down.shape[1])
        up, down, share = concept.at_rank(up, down, rows, adapter.rank)
        worst = min(worst, share)
        up, down = concept.even(up, down)
        spare = adapter.rank - len(down)
        if spare:
            random = adapter.tensors()["lora_down.weight"][len(down) :].to(down)
            up, down = torch.cat([up, up.new_zeros(len(up), spare)], 1), torch.cat([down, random])
        adapter.load({"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(adapter.rank))})
    if worst < 1:
        tell(f"{len(edit.down)} embeddings do not fit into the rank: at least {worst:.1%} of the change is kept.")
