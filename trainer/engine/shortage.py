"""Running out of memory: in which phase, what it needs, what is free, and which settings of the job need less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import AtelierError, MemoryShortageError
from ..models.room import free_bytes, give_back, is_shortage, let_go, used_bytes
from ..optim.optimizers import OPTIMIZERS
from ..params import core
from ..params.job import Job
from ..stages.abm import AbmParams
from ..stages.prior import PriorParams

LOADING, ADAPTER, IMAGES, TEXTS = "loading the model", "making the adapter", "encoding images", "encoding texts"
PREPARING, TRAINING, PREVIEW = "preparing the training", "training", "generating a preview"
SAVING, WHOLE = "saving the LoRA", "running the job"
"""The phases of a run."""
PICTURE = "generating an image"
"""Without a run."""

_GIB = 2**30
_ASKED = re.compile(
    r"(?:tried to allocate|to allocate|allocating|buffer size:)\s+([\d.]+)\s*(bytes|[KMGT]i?B)?", re.IGNORECASE
)
_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@contextmanager
def phase(
    name: str, device: torch.device, job: Job | None = None, needed: Callable[[], int] | None = None
) -> Iterator[None]:
    """One phase. Raises MemoryShortageError when memory runs out in it; everything is let go before.

    `needed` works out the bytes that the phase takes, of main memory when the model is loaded and else of the device;
    it is only asked then. None: what was in use and asked for.
    """
    try:
        yield
    except MemoryShortageError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, AtelierError) else error  # a reader puts it in words of its own
        if cause is None or not is_shortage(cause):
            raise
        main = _in_main_memory(cause, device)
        where = torch.device("cpu") if main else device
        asked, used = asked_bytes(cause), _used(where)
        let_go(error)
        give_back()
        about_it = main == (device.type == "cpu" or name == LOADING)
        figures = [_tried(needed) if needed is not None and about_it else None]
        figures.append(None if asked is None else asked + (used or 0))
        wanted = max((figure for figure in figures if figure is not None), default=None)
        raise MemoryShortageError(_text(name, where, wanted, _for_us(where), helps(name, job, where))) from None


def _tried(needed: Callable[[], int]) -> int | None:
    """The figure, unless it cannot be worked out now."""
    try:
        return needed()
    except Exception:  # what ran out is told in any case, and nothing of this may hide it
        return None


def _in_main_memory(error: BaseException, device: torch.device) -> bool:
    """Whether it was main memory that ran out and not the device's own."""
    if device.type == "cpu" or isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return not isinstance(error, torch.cuda.OutOfMemoryError) and any(
        part in text for part in ("defaultcpuallocator", "not enough memory", "paging file", "cannot allocate")
    )


def asked_bytes(error: BaseException) -> int | None:
    """The bytes that an error says were asked for; None when it does not say."""
    found = _ASKED.search(str(error))
    if not found:
        return None
    return int(float(found[1].rstrip(".")) * 2 ** _UNITS[(found[2] or "b")[0].lower()])


def _used(device: torch.device) -> int | None:
    """Bytes of a device's memory that this program has."""
    if device.type != "cpu":
        return used_bytes(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def _for_us(device: torch.device) -> int | None:
    """Bytes of a device's memory that no other program has."""
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available) + (_used(device) or 0)
    free, used = free_bytes(device), used_bytes(device)
    return None if free is None or used is None else free + used


def _text(name: str, device: torch.device, needed: int | None, free: int | None, hints: list[str]) -> str:
    figures = [
        *([] if needed is None else [f"about {needed / _GIB:.1f} GiB are needed"]),
        *([] if free is None else [f"{free / _GIB:.1f} GiB are free for this program"]),
    ]
    kind = "Main memory" if device.type == "cpu" else f"The memory of {device}"
    told = f" ({', '.join(figures)})" if figures else ""
    listed = "; or ".join(hints)
    return f"{kind} ran out while {name}{told}. {listed[0].upper()}{listed[1:]}."


def helps(name: str, job: Job | None, device: torch.device) -> list[str]:
    """What to change in this job so that a phase needs less, most helpful first."""
    others = "close other programs that use the GPU" if device.type != "cpu" else "close other programs"
    if job is None:
        return ["generate a smaller image", others]
    by_phase: dict[str, list[Callable[[Job], str]]] = {
        ADAPTER: [_type, _rank],
        IMAGES: [_vae, _size],
        TEXTS: [_model],
        PREPARING: [_prior, _abm, _checkpointing, _size, _model, _optimizer, _rank],
        TRAINING: [_checkpointing, _batch, _prior, _size, _model, _text_encoder, _optimizer, _type, _rank],
        PREVIEW: [_vae, _size, _previews],
        SAVING: [_type, _rank],
    }
    rules = by_phase.get(name, [_model, _vae])
    said = [line for rule in rules if (line := rule(job))]
    if device.type == "cpu":  # there everything computes in float32, and no optimizer has 8 bits
        said = [line for line in said if "8bit" not in line]
    return [*said, others]


def _checkpointing(job: Job) -> str:
    return "" if job[core.Train].use_gradient_checkpointing else "switch use_gradient_checkpointing on"


def _batch(job: Job) -> str:
    size, more = job[core.Train].train_batch_size, job[core.Train].train_gradient_accumulation
    if size == 1:
        return ""
    return f"lower train_batch_size (now {size}) and raise train_gradient_accumulation (now {more}) instead"


def _size(job: Job) -> str:
    height, width = job[core.Images].image_size
    return f"lower image_size (now {height},{width})" if max(height, width) > 512 else ""


def _model(job: Job) -> str:
    given = job[core.Train].train_model_precision
    return "" if given in ("fp16", "bf16") else f"set train_model_precision to bf16 or fp16 (now {given})"


def _vae(job: Job) -> str:
    given = job[core.Train].train_VAE_precision
    return "" if given in ("fp16", "bf16") else f"set train_VAE_precision to bf16 (now {given})"


def _text_encoder(job: Job) -> str:
    network = job[core.Network]
    trained = network.network_targets != "unet" and "BASE" in network.network_blocks
    return f"train the UNet alone: network_targets unet (now {network.network_targets})" if trained else ""


def _optimizer(job: Job) -> str:
    given = job[core.Train].train_optimizer
    name = OPTIMIZERS.canonical(given)
    if "8bit" in name or name in ("AdaFactor", "CAME"):
        return ""
    smaller = f"{name}8bit" if f"{name}8bit" in OPTIMIZERS.names() else "AdamW8bit"
    return f"take train_optimizer {smaller} (now {given})"


def _prior(job: Job) -> str:
    own, usual = job[PriorParams], job[core.Train].train_batch_size
    rows = own.prior_batch_size or usual
    return f"lower prior_batch_size (now {rows})" if own.prior_loss_weight and rows > 1 else ""


def _abm(job: Job) -> str:
    own, usual = job[AbmParams], job[core.Train].train_batch_size
    rows = own.abm_batch_size or usual
    return f"lower abm_batch_size (now {rows})" if own.abm_enabled and rows > 1 else ""


def _type(job: Job) -> str:
    kind = job[core.Network].network_type
    return f"take network_type lierla (now {kind}), which has far fewer numbers" if kind == "full" else ""


def _rank(job: Job) -> str:
    rank = job[core.Network].network_rank
    return f"lower network_rank (now {rank})" if rank > 4 else ""


def _previews(job: Job) -> str:
    return f"generate no previews: sample_every 0 (now {job[core.Sample].sample_every})"
