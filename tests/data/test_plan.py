"""Batches: complete epochs, one bucket each, a pure function of seed and number."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.plan import Plan
from trainer.errors import DataError


@st.composite
def pools(draw: st.DrawFn) -> list[list[int]]:
    """One to five pools of own indices, some of them several times."""
    found, first = [], 0
    for size in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        found.append([index for index in range(first, first + size) for _ in range(draw(st.integers(1, 3)))])
        first += size
    return found


@settings(max_examples=80, deadline=None)
@given(pools(), st.integers(-1, 2**40), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_holds_everything_once(chosen: list[list[int]], seed: int, batch_size: int, epoch: int) -> None:
    plan = Plan(chosen, seed, batch_size)
    first = epoch * plan.batches_per_epoch
    batches = [plan.batch(first + number) for number in range(plan.batches_per_epoch)]
    assert Counter(index for batch in batches for index in batch) == Counter(index for pool in chosen for index in pool)
    assert sum(map(len, batches)) == plan.samples_per_epoch
    owner = {index: number for number, pool in enumerate(chosen) for index in pool}
    assert all(len({owner[index] for index in batch}) == 1 for batch in batches)
    short = Counter(owner[batch[0]] for batch in batches if len(batch) < batch_size)
    assert all(0 < len(batch) <= batch_size for batch in batches) and all(count == 1 for count in short.values())


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(0, 2**32), st.integers(1, 5), st.randoms(use_true_random=False))
def test_order_of_asking_does_not_matter(
    chosen: list[list[int]], seed: int, batch_size: int, draw: random.Random
) -> None:
    plan = Plan(chosen, seed, batch_size)
    count = 3 * plan.batches_per_epoch
    forwards = [plan.batch(number) for number in range(count)]
    order = list(range(count))
    draw.shuffle(order)
    again = Plan(chosen, seed, batch_size)
    assert all(again.batch(number) == forwards[number] for number in order)
    assert Plan(chosen, seed, batch_size).batch(count - 1) == forwards[-1]


def test_seed_and_epoch_change_the_order() -> None:
    chosen = [list(range(50))]
    assert Plan(chosen, 1, 4).epoch(0) != Plan(chosen, 2, 4).epoch(0)
    assert Plan(chosen, 1, 4).epoch(0) != Plan(chosen, 1, 4).epoch(1)


def test_the_order_stays_the_same_in_every_version() -> None:
    assert Plan([[0, 1, 2, 3, 4], [5, 6, 7]], 7, 2).epoch(0) == ((7,), (0,), (5, 6), (2, 4), (1, 3))


def test_short_batches_are_kept() -> None:
    plan = Plan([range(5), range(5, 6)], 0, 4)
    assert plan.batches_per_epoch == 3 and sorted(map(len, plan.epoch(0))) == [1, 1, 4]


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(3)
    before = random.getstate()
    Plan([range(9)], 0, 2).batch(17)
    assert random.getstate() == before


def test_refusals() -> None:
    with pytest.raises(DataError, match="train_batch_size = 0"):
        Plan([[0]], 0, 0)
    with pytest.raises(DataError, match="no images"):
        Plan([[]], 0, 1)
    with pytest.raises(ValueError, match="counted from 0"):
        Plan([[0]], 0, 1).batch(-1)
