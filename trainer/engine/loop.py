"""The training loop: batch → loss → backward → step → event. No mode, host or form is known here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DivergedError
from ..events import EventLog, Step
from ..optim.optimizers import rates as optimizer_rates
from .control import Control
from .losses import LossRing
from .session import Session

_NOT_FINITE = (
    "The loss became {loss} at step {step}. The update was discarded and the last good file is kept. "
    "Lower train_learning_rate (now {rate:g}), set train_max_grad_norm to 1, or train with train_model_precision bf16 "
    "or fp32."
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
        total += loss.detach()
    for stage in session.stages:
        penalty = stage.penalty(session.network)
        if penalty is not None:
            penalty = penalty / session.process.count  # every process adds its part of one penalty
            session.scaler.scale(penalty).backward()
            total += penalty.detach()
    session.process.sum([total, *session.flat.gradients])
    return total


def optimizer_step(session: Session, plateau: float | None) -> Tensor:
    """One optimizer step; returns its loss, 0-d on the device. A non-finite step leaves the parameters as they were."""
    for stage in session.stages:
        stage.step(session.network, session.step, session.limits.total_steps)
    loss = gradients(session, session.step)
    scaler, flat = session.scaler, session.flat
    if scaler.is_enabled():
        scaler.unscale_(session.optimizer)
    finite = flat.guard(loss, session.limits.max_grad_norm)
    flat.remember()
    scaler.step(session.optimizer)
    scaler.update()
    flat.undo_unless(finite)
    session.network.limit_norms()
    session.scheduler.step(plateau)
    session.step += 1
    if scaler.is_enabled():  # an overflow of the scaled gradients is the scaler's own business, a broken loss is not
        return loss
    return torch.where(finite, loss, torch.full_like(loss, math.nan))


def run_steps(session: Session, control: Control, log: EventLog, ring: LossRing, hooks: Hooks) -> None:
    """Run optimizer steps from `session.step` to the end or to a stop. Raises DivergedError when the loss breaks."""
    limits = session.limits
    ring.restart_clock()
    while session.step < limits.total_steps and not control.stopping:
        rates = tuple(optimizer_rates(session.optimizer).values())
        ring.push(session.step + 1, optimizer_step(session, ring.plateau), rates)
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


def tell(session: Session, ring: LossRing, log: EventLog, finite: bool = False) -> None:
    """Read the pending losses and report them, with `finite` those before the first that is not finite. Raises
    DivergedError at that one.
    """
    readings, per_step = ring.read(finite)
    limits = session.limits
    for reading in readings:
        if not math.isfinite(reading.loss):
            rate = max(reading.rates, default=0.0)
            raise DivergedError(_NOT_FINITE.format(loss=reading.loss, step=reading.step, rate=rate))
        log.tell(
            Step(
                step=reading.step,
                total=limits.total_steps,
                loss=reading.loss,
                loss_ema=reading.ema,
                rates=reading.rates,
                images_per_second=limits.batch_size * limits.accumulation / max(per_step, 1e-9),
                seconds_left=per_step * (limits.total_steps - reading.step),
                at=time.time(),
            )
        )
