"""The training loop: batch → loss → backward → step → event. No mode, host or form is known here."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DivergedError
from ..events import EventLog, Step
from ..maths.scaling import masked_step, takes_mask
from ..optim.optimizers import rates as optimizer_rates
from .control import Control
from .flags import native_bf16
from .losses import LossRing
from .session import Session
from .state import fitting

_NOT_FINITE = (
    "The loss became {loss} at step {step}. The update was discarded and the last good file is kept. "
    "Lower train_learning_rate (now {rate:g}), set train_max_grad_norm to 1, or {advice}."
)
_SKIPPED = "fp16 gradients overflowed: {count} step(s) up to step {step} skipped, the loss scale is now {scale:g}."
_NOTHING_LEARNED = (
    "fp16 gradients overflowed in {row} steps in a row, up to step {step} (loss scale {scale:g}), so that nothing is "
    "learned. The last good file is kept. Lower train_learning_rate (now {rate:g}), or {advice}."
)


@dataclass
class Hooks:
    """What happens between steps: `keep` writes the resume state, `save` an intermediate file, `sample` pictures."""

    keep: Callable[[LossRing], None]
    save: Callable[[], None]
    sample: Callable[[], None]


def gradients(session: Session, step: int) -> Tensor:
    """Accumulate the gradients of one optimizer step over its micro batches and all processes; returns the mean loss,
    0-d.
    """
    micro_batches = session.limits.length.micro_batches(step)
    total = torch.zeros((), device=session.model.device)
    session.flat.zero_gradients()
    for number in micro_batches:
        batch = session.source.batch(number)
        if batch is None:
            continue
        with session.network.drawing(session.seed, batch.index, batch.samples):
            loss = session.mode.loss(session.kit, batch).sum() / (batch.share * len(micro_batches))
            if loss.requires_grad:  # module dropout may have left out every layer
                session.scaler.scale(loss).backward()
                session.flat.collect()
        total += loss.detach()
    for stage in session.stages:
        penalty = stage.penalty(session.network)
        if penalty is not None:
            penalty = penalty / session.process.count  # every process adds its part of one penalty
            session.scaler.scale(penalty).backward()
            session.flat.collect()
            total += penalty.detach()
    session.process.sum([total, *session.flat.gradients])
    return total


def optimizer_step(session: Session, plateau: float | None) -> Tensor:
    """One optimizer step; returns its loss, 0-d on the device. A non-finite step leaves the parameters as they were.

    Whether the scaler skipped it, and its scale, are left in `session.scaling`, on the device too.
    """
    for stage in session.stages:
        stage.step(session.network, session.step, session.limits.total_steps)
    loss = gradients(session, session.step)
    scaler, flat = session.scaler, session.flat
    scaled = scaler.is_enabled()
    if scaled:
        scaler.unscale_(session.optimizer)
    finite = flat.guard(loss, session.limits.max_grad_norm)
    session.between = False
    with fitting() if session.restored else contextlib.nullcontext():
        _step(session, finite)
        if not session.skips.hold():
            session.scheduler.step(plateau)
    session.restored = False
    with flat.exact():
        session.network.limit_norms()
    flat.publish()
    session.step += 1
    session.between = True
    if scaled:  # an overflow of the scaled gradients is the scaler's own business, a broken loss is not
        session.scaling = (~finite, scaler.scale(torch.ones_like(loss)))
        return loss
    return torch.where(finite, loss, torch.full_like(loss, math.nan))


def _step(session: Session, finite: Tensor) -> None:
    """Let the optimizer step; where the gradients are not `finite` (0-d bool) the parameters stay as they were."""
    if session.scaler.is_enabled():
        session.scaler.step(session.optimizer)
        session.scaler.update()
    elif takes_mask(session.optimizer):
        masked_step(session.optimizer, finite)
    else:  # without reading the device there is no other way than to undo it
        session.flat.remember()
        session.optimizer.step()
        session.flat.undo_unless(finite)


def run_steps(session: Session, control: Control, log: EventLog, ring: LossRing, hooks: Hooks) -> None:
    """Run optimizer steps from `session.step` to the end or to a stop. Raises DivergedError when the loss breaks."""
    limits = session.limits
    ring.restart_clock()
    while session.step < limits.total_steps and not control.stopping:
        rates = tuple(optimizer_rates(session.optimizer).values())
        loss = optimizer_step(session, ring.plateau)
        ring.push(session.step, loss, rates, session.scaling)
        step = session.step
        state_due = bool(limits.state_every) and step % limits.state_every == 0
        sample_due = bool(limits.sample_every) and step % limits.sample_every == 0
        save_due = step in limits.save_steps
        if ring.due or state_due or sample_due or save_due:
            tell(session, ring, log)
        elif ring.overdue:  # clocks differ: several processes stop together, at a step that all of them read
            tell(session, ring, log, finite=session.process.count > 1)
        if save_due:
            hooks.save()
        if sample_due:
            hooks.sample()
        if state_due:
            hooks.keep(ring)
        if save_due or sample_due or state_due:
            ring.restart_clock()
    tell(session, ring, log)
    if session.skips.total:
        log.note(f"{session.skips.total} of {session.step} steps were skipped, because fp16 gradients overflowed.")


def tell(session: Session, ring: LossRing, log: EventLog, finite: bool = False) -> None:
    """Read the pending losses and report them, with `finite` those before the first that is not finite. Raises
    DivergedError at that one, and, without `finite`, when fp16 skips steps without end.
    """
    before = session.skips.total
    readings, per_step = ring.read(finite)
    limits = session.limits
    for reading in readings:
        learns = session.skips.take(reading) or finite
        if not learns or not math.isfinite(reading.loss):
            said = _NOTHING_LEARNED if math.isfinite(reading.loss) else _NOT_FINITE
            facts = {"loss": reading.loss, "step": reading.step, "scale": reading.scale, "row": session.skips.row}
            rate, advice = max(reading.rates, default=0.0), wider_precision(session)
            raise DivergedError(said.format(**facts, rate=rate, advice=advice))
        log.tell(
            Step(
                step=reading.step,
                total=limits.total_steps,
                loss=reading.loss,
                loss_ema=reading.ema,
                rates=reading.rates,
                images_per_second=limits.batch_size * limits.accumulation / max(per_step, 1e-9),
                seconds_left=per_step * (limits.total_steps - reading.step),
                skipped=session.skips.total,
                at=time.time(),
            )
        )
    if session.skips.total > before:
        last = readings[-1]
        log.note(_SKIPPED.format(count=session.skips.total - before, step=last.step, scale=last.scale))


def wider_precision(session: Session) -> str:
    """The advice to train with a precision of a larger range, as far as this run has not got it."""
    wide = "bf16 or fp32" if native_bf16(session.model.device) else "fp32"
    fields = []
    if session.model.compute == torch.float16:
        fields.append("train_model_precision")
    if any(value.dtype == torch.float16 for value in session.flat.values):
        fields.append("train_lora_precision")
    return f"train with {' and '.join(fields) or 'train_model_precision'} {wide}"
