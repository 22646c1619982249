"""How long a run is: every picture as often as there are epochs, whatever batches, accumulation and processes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import engine_case
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from trainer.data.plan import Plan, filled
from trainer.engine import arguments, loop
from trainer.engine.length import Length
from trainer.engine.sources import share_of

pytestmark = pytest.mark.usefixtures("no_estimate")

POOLS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("length"))


@settings(max_examples=200, deadline=None)
@given(POOLS, st.integers(1, 7), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_every_picture_is_seen_once_per_epoch(shapes, batch_size, accumulation, epochs, processes):
    """Buckets of pictures with repeats, cut into the shares of the processes: each is seen `epochs` × its repeats."""
    pools, first = [], 0
    for count, repeats in shapes:
        pools.append([picture for picture in range(first, first + count) for _ in range(repeats)])
        first += count
    plan = Plan(pools, 7, batch_size * processes)
    length = Length.of_epochs(epochs, accumulation, plan.batches_per_epoch)
    seen: Counter[int] = Counter()
    for step in range(length.steps):
        assert length.micro_batches(step)
        for number in length.micro_batches(step):
            whole = plan.batch(number)
            for rank in range(processes):
                seen.update(whole[share_of(whole, SimpleNamespace(rank=rank), batch_size)])
    assert seen == Counter({picture: epochs * count for picture, count in Counter(chain(*pools)).items()})
    assert length.epochs == epochs == length.begun(length.steps)
    assert not length.micro_batches(length.steps)
    steps_of_an_epoch = plan.batches_per_epoch / accumulation
    assert length.steps == math.ceil(epochs * steps_of_an_epoch) and length.steps_per_epoch == steps_of_an_epoch
    for epoch in range(1, epochs + 1):
        end = length.end_of(epoch)
        assert length.seen(end) >= epoch * plan.batches_per_epoch > length.seen(end - 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 20))
def test_a_run_of_steps_has_whole_steps(steps, accumulation, per_epoch):
    length = Length.of_steps(steps, accumulation, per_epoch)
    numbers = [number for step in range(steps) for number in length.micro_batches(step)]
    assert numbers == list(range(steps * accumulation))
    assert all(length.begun(step) == math.ceil(step * accumulation / per_epoch) for step in range(steps + 1))


def test_a_small_pool_is_filled_to_whole_batches():
    assert [filled(range(count), 4) for count in (1, 4, 5)] == [(0, 0, 0, 0), (0, 1, 2, 3), (0, 1, 2, 3, 4)]
    assert filled(range(3), 2) == (0, 1, 2) and Counter(filled(range(3), 4)) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(2, 2, 3), (4, 16, 5), (4, 3, 1)])
def test_a_run_sees_every_picture_that_often(case, monkeypatch, batch, accumulation, epochs):
    """Six pictures through the engine: what is trained on, what is reported, and what the file and its saves say."""
    seen: Counter[int] = Counter()
    asked = Plan.batch
    trained = []

    def counted(session, step):
        for number in session.limits.length.micro_batches(step):
            seen.update(asked(session.source.plan, number))
        trained.append(session.limits.length)
        return gradients(session, step)

    gradients = loop.gradients
    monkeypatch.setattr(loop, "gradients", counted)
    name = f"b{batch}a{accumulation}"
    given_ = {"train_epochs": epochs, "train_batch_size": batch, "train_gradient_accumulation": accumulation}
    result = case.run(save_lora_name=name, save_per_epochs=1, **given_)
    assert set(seen) == set(range(6)) and set(seen.values()) == {epochs}
    batches = math.ceil(6 / batch)
    steps = math.ceil(epochs * batches / accumulation)
    report = result.report
    assert (report["iterations"], report["epochs"], len(trained)) == (steps, epochs, steps)
    assert report["steps per epoch"] == round(batches / accumulation, 2)
    with safe_open(result.path, "pt") as file:
        said = file.metadata()
    assert (said["ss_epoch"], said["ss_num_epochs"], said["ss_steps"]) == (str(epochs), str(epochs), str(steps))
    ends = {math.ceil(epoch * batches / accumulation) for epoch in range(1, epochs)} - {steps}
    names = {path.stem for path in result.path.parent.glob(f"{name}*.safetensors")}
    assert names == {name, *(f"{name}_{end}steps" for end in ends)}


@pytest.mark.parametrize("mode", ["ADDifT", "Difference", "iLECO"])
def test_modes_without_a_folder_do_not_count_in_epochs(case, mode):
    job = case.job(
        mode=mode,
        train_epochs=5,
        train_iterations=7,
        save_per_epochs=1,
        **{"original prompt": "a", "target prompt": "b", "original image": "a.png", "target image": "b.png"},
    )
    length = arguments.limits(job, 3, 1)
    assert length.total_steps == 7 and not length.save_steps
