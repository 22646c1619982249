"""Settings of the adapter that several types share. Each is carried out once, in `adapters/base.py` or `network.py`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .core import Network, Train
from .field import ModeInfo, param
from .job import Job
from .names import BLOCKS
from .rules import Rule

GROUP = "option"
INITS = ("default", "pissa", "milora", "olora", "lora_ga", "instant")
DIFFERENCE_INITS = frozenset({"pissa", "milora", "olora", "lora_ga"})
"""Starts that are not zero: the adapter is what it has become since, and its file has twice the rank."""


@dataclass(frozen=True)
class NetworkOptions:
    """What most types understand. The tags are those of `Adapter.tags`, which follow from what a type is made of."""

    network_rslora: bool = param(
        False,
        "Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), for high ranks.",
        GROUP,
        needs="alpha",
    )
    network_freeze_down: bool = param(
        False,
        "Train only the up matrices and keep the down matrices random (LoRA-FA): less memory, slower to learn.",
        GROUP,
        needs="freeze_down",
    )
    network_dropout: float = param(
        0.0,
        "Dropout: probability that a value inside the adapter is zeroed in a step. 0.1 against overfitting.",
        GROUP,
        needs="dropout",
        low=0,
        high=0.95,
    )
    network_rank_dropout: float = param(
        0.0,
        "Probability that a rank of a layer (or a row of types without ranks) is zeroed in a step.",
        GROUP,
        needs="dropout",
        low=0,
        high=0.95,
    )
    network_module_dropout: float = param(
        0.0,
        "Probability that the whole adapter of a layer is skipped in a step.",
        GROUP,
        needs="steps",
        low=0,
        high=0.95,
    )
    network_max_norm: float = param(
        0.0,
        "Max-norm: a layer's ΔW is scaled back to this norm after a step. 1 is usual, 0 is off.",
        GROUP,
        needs="max_norm",
        low=0,
        high=1_000_000,
    )
    loraplus_lr_ratio: float = param(
        1.0,
        "Learning rate factor of the up matrices (LoRA+): 16 with a lower rate is usual, 1 is off.",
        GROUP,
        needs="loraplus",
        low=2**-10,
        high=1024,
    )
    loraplus_te_lr_ratio: float | None = param(
        None,
        "The same factor for the text encoder; empty takes loraplus_lr_ratio.",
        GROUP,
        needs="loraplus",
        low=2**-10,
        high=1024,
    )
    network_init: str = param(
        "default",
        "Initialisation: random (default), largest or smallest singular vectors (pissa, milora), QR (olora), first"
        " gradient (lora_ga), or the closed-form result of a prompt pair (instant).",
        GROUP,
        needs="init",
        choices=INITS,
    )
    network_block_ranks: str = param(
        "", "Ranks of single blocks, as in IN00=4;OUT*=8. Other blocks have network_rank.", GROUP, needs="rank"
    )
    network_block_alphas: str = param(
        "", "Alphas of single blocks, as in IN00=2;OUT*=4. Other blocks have network_alpha.", GROUP, needs="alpha"
    )
    network_block_lrs: str = param(
        "",
        "Learning rate factors of single blocks, as in M00=0.5;OUT*=2. Other blocks have 1.",
        GROUP,
        needs="steps",
    )
    network_name_filter: str = param(
        "", "Patterns of layer names to train, as in *attn2*;!*to_out*: one must match, none with ! may match.", GROUP
    )


def parse_blocks(text: str) -> dict[str, float]:
    """`IN00=4;OUT*=8` → number by block; a later entry wins. Raises ValueError saying what is wrong with which entry.

    Entries are separated by `;`, `,` or line ends; a block may be a pattern.
    """
    found: dict[str, float] = {}
    for entry in _entries(text):
        name, equals, number = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(f"{entry!r} is not block=number, as in IN00=4;OUT*=8.")
        blocks = [block for block in BLOCKS if fnmatchcase(block, name.upper())]
        if not blocks:
            raise ValueError(f"{name!r} is no block. Blocks are BASE, IN00 to IN11, M00 and OUT00 to OUT11.")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"{number!r} (of {name}) is not a number.") from None
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{number} (of {name}) must be above 0; take a block out of network_blocks instead.")
        found.update(dict.fromkeys(blocks, value))
    return found


def parse_block_ranks(text: str) -> dict[str, int]:
    """The same for whole numbers. Raises ValueError."""
    found = parse_blocks(text)
    for block, value in found.items():
        if value != int(value) or value > 1024:
            raise ValueError(f"{value:g} (of {block}) is not a rank: a whole number from 1 to 1024.")
    return {block: int(value) for block, value in found.items()}


def name_chosen(patterns: str, names: tuple[str, ...]) -> bool:
    """Whether a layer with these names passes a name filter: one plain pattern fits (or there is none), no `!` one."""
    entries = _entries(patterns)
    wanted = [entry for entry in entries if not entry.startswith("!")]
    refused = [entry[1:].strip() for entry in entries if entry.startswith("!")]

    def fits(these: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in these for name in names)

    return (not wanted or fits(wanted)) and not fits(refused)


def unused_patterns(patterns: str, names: Collection[str]) -> list[str]:
    """The entries of a name filter that no name fits."""
    plain = [(entry, entry.removeprefix("!").strip()) for entry in _entries(patterns)]
    return [entry for entry, pattern in plain if not any(fnmatchcase(name, pattern) for name in names)]


def idle_entries(text: str, blocks: Collection[str]) -> list[str]:
    """The entries of a `block=number` text that speak of none of these blocks. Raises ValueError as `parse_blocks`."""
    return [entry for entry in _entries(text) if not set(parse_blocks(entry)) & set(blocks)]


def _entries(text: str) -> list[str]:
    return [entry.strip() for line in text.splitlines() for entry in line.replace(",", ";").split(";") if entry.strip()]


def _block_rule(name: str) -> Rule:
    parse = parse_block_ranks if name == "network_block_ranks" else parse_blocks

    def check(job: Job, mode: ModeInfo) -> str:
        try:
            given = parse(getattr(job[NetworkOptions], name))
        except ValueError as error:
            return f"cannot be used: {error}"
        chosen = job[Network].network_blocks
        idle = [block for block in given if block not in chosen]
        if given and len(idle) == len(given):
            return f"speaks only of blocks that network_blocks leaves out ({', '.join(idle[:3])}); select them there."
        return ""

    return Rule((name, "network_blocks"), check)


def init_and_resume(job: Job, mode: ModeInfo) -> str:
    """Two beginnings at once."""
    init = job[NetworkOptions].network_init
    if init == "default" or not job[Network].network_resume:
        return ""
    return f"would replace what network_resume ({job[Network].network_resume}) brings; empty one of the two."


def plain_init(job: Job, mode: ModeInfo) -> str:
    """A start that is a pair of factors, for a type that scales or splits them."""
    init = job[NetworkOptions].network_init
    if init == "default" or not job.value("use_dora"):
        return ""
    return f"= {init} is for plain LoRA; switch use_dora off, or set network_init to default."


def averaged_norm(job: Job, mode: ModeInfo) -> str:
    """A limit on weights that are not the ones saved."""
    options, name = job[NetworkOptions], job[Train].train_optimizer
    if not options.network_max_norm or not name.endswith("ScheduleFree"):
        return ""
    return f"would not hold for the file: {name} saves an average, not the weights it trains. Choose another optimizer."


def norm_of_difference(job: Job, mode: ModeInfo) -> str:
    """A limit on a difference, which cannot be scaled back through its factors."""
    options = job[NetworkOptions]
    if not options.network_max_norm or options.network_init not in DIFFERENCE_INITS:
        return ""
    return f"does not work with network_init {options.network_init}; set one of the two back."


def high_ratio(job: Job, mode: ModeInfo) -> str:
    """LoRA+ on top of a rate that is high already."""
    options, train = job[NetworkOptions], job[Train]
    fast = train.train_learning_rate * options.loraplus_lr_ratio
    if options.loraplus_lr_ratio <= 1 or fast < 0.02 or train.train_optimizer != "AdamW":
        return ""
    return f"makes the rate of the up matrices {fast:g}, which easily breaks the image; lower train_learning_rate."


RULES: tuple[Rule, ...] = (
    *(_block_rule(name) for name in ("network_block_ranks", "network_block_alphas", "network_block_lrs")),
    Rule(("network_init", "network_resume"), init_and_resume),
    Rule(("network_init", "use_dora"), plain_init),
    Rule(("network_max_norm", "train_optimizer"), averaged_norm),
    Rule(("network_max_norm", "network_init"), norm_of_difference),
    Rule(("loraplus_lr_ratio", "train_learning_rate", "train_optimizer"), high_ratio, warning=True),
)


def shown_options(options: NetworkOptions) -> Mapping[str, str]:
    """What differs from its default, under the names kohya and LyCORIS give it in a file's network arguments."""
    names = {
        "network_rslora": "rs_lora",
        "network_dropout": "dropout",
        "network_rank_dropout": "rank_dropout",
        "network_module_dropout": "module_dropout",
        "network_max_norm": "scale_weight_norms",
        "network_block_ranks": "block_dims",
        "network_block_alphas": "block_alphas",
    }
    default, found = NetworkOptions(), {}
    for name in NetworkOptions.__dataclass_fields__:
        value = getattr(options, name)
        if value != getattr(default, name):
            found[names.get(name, name)] = str(value)
    return found
