"""When losses are read: after the first step, every ten, once a second; and that it changes nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.engine.losses import EMA_DECAY, READ_EVERY, LossRing

CPU = torch.device("cpu")


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(losses, seconds, extra=(), several=False):
    """Steps of `seconds` each, read when the ring asks for it and after the steps in `extra`: (groups, ring, plateaus
    seen before each step).
    """
    clock = Clock()
    ring = LossRing(CPU, clock=clock)
    ring.restart_clock()
    groups, plateaus = [], []
    for step, loss in enumerate(losses, start=1):
        plateaus.append(ring.plateau)
        ring.push(step, torch.tensor(loss), (1e-3,))
        clock.now += seconds
        if ring.due or step in extra:
            groups.append((step, *ring.read()))
        elif ring.overdue:
            groups.append((step, *ring.read(several)))
    return groups, ring, plateaus


@pytest.mark.parametrize(
    ("seconds", "reads"),
    [(0.001, [1, 10, 20]), (0.25, [1, 5, 9, 10, 14, 18, 20]), (5.0, list(range(1, 21)))],
)
def test_the_first_step_is_read_at_once_and_then_one_at_least_each_second(seconds, reads):
    groups, _, _ = run([0.5] * 20, seconds)
    assert [step for step, _, _ in groups] == reads
    assert [one.step for _, readings, _ in groups for one in readings] == list(range(1, 21))
    assert all(pace == pytest.approx(seconds) for _, _, pace in groups)


def test_steps_that_are_only_queued_on_a_gpu_are_read_by_the_time_they_take():
    clock = Clock()
    ring = LossRing(CPU, clock=clock)
    ring.push(1, torch.tensor(1.0), ())
    clock.now += 3.0
    ring.read()
    ring.push(2, torch.tensor(1.0), ())  # sent in no time at all
    assert ring.overdue


def test_when_losses_are_read_changes_neither_average_nor_plateau():
    losses = [1.0 + math.sin(step) / 2 for step in range(1, 41)]
    usual = run(losses, 0.0)
    for seconds, extra in ((0.3, ()), (2.0, ()), (0.0, (3, 7, 13, 24))):
        _, ring, plateaus = run(losses, seconds, extra)
        assert plateaus == usual[2]
        assert (ring.average, ring.plateau) == (usual[1].average, usual[1].plateau)
    average = torch.tensor(losses[0]).item()
    for loss in losses[1:READ_EVERY]:
        average = EMA_DECAY * average + (1 - EMA_DECAY) * torch.tensor(loss).item()
    assert usual[2][READ_EVERY] == average


def test_several_processes_learn_of_a_broken_loss_at_one_step_whatever_their_clocks_say():
    losses = [0.5, 0.5, 0.5, math.nan, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    for seconds in (0.0, 0.4, 5.0):
        groups, _, _ = run(losses, seconds, several=True)
        broken = [step for step, readings, _ in groups if any(not math.isfinite(one.loss) for one in readings)]
        assert broken == [10]
        assert [one.step for _, readings, _ in groups for one in readings] == list(range(1, 11))


def test_time_that_was_no_training_does_not_count():
    clock = Clock()
    ring = LossRing(CPU, clock=clock)
    clock.now += 60.0  # encoding
    ring.restart_clock()
    ring.push(1, torch.tensor(1.0), ())
    clock.now += 2.0
    assert ring.read()[1] == 2.0
