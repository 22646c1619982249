"""Prior preservation: the penalty is what its definition says, and it keeps what it names."""

from __future__ import annotations

from types import SimpleNamespace

import engine_case
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.data.cache import TensorCache
from trainer.engine.catalogue import catalogue
from trainer.engine.estimate import phase_bytes
from trainer.engine.kit import Kit
from trainer.engine.reload import written_network
from trainer.events import EventLog, Note, Stage
from trainer.maths.alphas import scaled_linear_alphas
from trainer.maths.process import Diffusion
from trainer.models.load import load_model
from trainer.modes.base import Batch
from trainer.modes.ileco import Bank, _answered
from trainer.params.codec import load
from trainer.stages.prior import STEPS, Prior
from trainer.stages.trajectories import State

pytestmark = pytest.mark.usefixtures("no_estimate")

PROMPT = "a red circle"
OWN: dict[str, object] = {"network_targets": "unet", "prior_prompts": PROMPT, "prior_states": STEPS}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("prior"))


def distances(model, network, states, strength: float = 1.0) -> torch.Tensor:
    """‖ε_strength − ε_0‖² at every state, with the prompt of the test."""
    text = model.encode_prompts([PROMPT], 1)
    found = []
    with torch.no_grad():
        for state in states:
            with network.at_strength(strength):
                own = model.predict(state.x, state.t, text, None)
            with network.at_strength(0.0):
                base = model.predict(state.x, state.t, text, None)
            found.append((own - base).square().mean())
    return torch.stack(found)


def test_the_penalty_is_the_weighted_distance_to_the_untouched_model_at_one_of_its_own_states(case) -> None:
    model, found = load_model(case.model), []
    for weight in (1.0, 3.0):
        job = case.job(**OWN, prior_loss_weight=weight, prior_batch_size=1, train_snr_gamma=0)
        session = engine_case.session(case, job, model)
        try:
            (stage,) = session.stages
            assert stage.penalty(session.network).item() == pytest.approx(0.0, abs=1e-12)  # nothing is learned yet
            torch.manual_seed(0)
            with torch.no_grad():
                for value in session.flat.values:
                    value.add_(0.02 * torch.randn_like(value))
            states = stage._states
            assert len(states) == STEPS and states[0].t > states[-1].t
            expected = weight * distances(model, session.network, states)
            for step in range(3):
                stage.step(session.network, step, 12)
                penalty = stage.penalty(session.network)
                assert float((expected - penalty.detach()).abs().min()) < 1e-5 * float(penalty)
                found.append(float(penalty))
            penalty.backward()
            assert any(float(gradient.abs().max()) > 0 for gradient in session.flat.gradients)
        finally:
            session.network.eject()
    assert found[3:] == pytest.approx([3 * value for value in found[:3]]) and len(set(found)) > 2


def test_only_states_at_or_below_the_highest_timestep_are_held_and_as_many_as_asked(case) -> None:
    job = case.job(**{**OWN, "prior_states": 6}, prior_loss_weight=1.0, prior_max_timesteps=331)
    session = engine_case.session(case, job, load_model(case.model))
    try:
        (stage,) = session.stages
        assert [int(state.t) for state in stage._states] == 2 * [330, 196, 62]
    finally:
        session.network.eject()


@pytest.mark.parametrize(("rows", "apart"), [(1, True), (2, True), (3, True), (2, False)])
def test_both_directions_are_held_in_turns(case, monkeypatch, rows: int, apart: bool) -> None:
    """One state alone is held, so that of each step the strengths of its rows are all there is to know."""
    monkeypatch.setattr(Kit, "per_sample", apart)
    model = load_model(case.model)
    job = case.job(
        **{**OWN, "prior_states": 1, "prior_max_timesteps": 100, "prior_both_directions": True},
        prior_loss_weight=1.0, prior_batch_size=rows, train_snr_gamma=0,
    )  # fmt: skip
    session = engine_case.session(case, job, model)
    try:
        (stage,) = session.stages
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in session.flat.values:
                value.add_(0.3 * torch.randn(value.shape, generator=stream))
        assert len(stage._states) == 1
        ahead, back = (float(distances(model, session.network, stage._states, sign)) for sign in (1.0, -1.0))
        assert abs(ahead / back - 1) > 0.01
        seen = []
        for step in range(2):
            stage.step(session.network, step, 12)
            seen.append(float(stage.penalty(session.network).detach()))
        mixed = [sum((ahead, back)[(step + row) % 2] for row in range(rows)) / rows for step in range(2)]
        assert seen == pytest.approx(mixed if apart else [ahead, back], rel=1e-4)
        assert session.network.strength.value == 1.0  # as before
    finally:
        session.network.eject()


def test_a_run_with_it_stays_nearer_to_the_untouched_model(case) -> None:
    model, moved = load_model(case.model), {}
    for weight in (0.0, 100.0):
        trace = engine_case.Trace()
        own = {**OWN, "prior_loss_weight": weight, "train_learning_rate": 0.01, "save_lora_name": f"prior{weight:g}"}
        result = case.run(trace, **own)
        notes = [event.text for event in trace.events if isinstance(event, Note)]
        assert any("will be kept as they are" in note for note in notes) == bool(weight)
        drawn = [event for event in trace.events if isinstance(event, Stage) and event.name.startswith("sampling")]
        assert drawn[-1].done == drawn[-1].total >= STEPS if weight else not drawn
        job = case.job(**OWN, prior_loss_weight=1.0)
        network = written_network(job, model, result.path, EventLog())
        session = engine_case.session(case, job, model)
        states = session.stages[0]._states
        session.network.eject()
        with network.attached():
            moved[weight] = float(distances(model, network, states).mean())
    assert 0 < moved[100.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("both", [False, True])
def test_a_resumed_run_goes_on_alike(case, both: bool) -> None:
    own = {**OWN, "prior_loss_weight": 10.0, "prior_both_directions": both}
    parts, whole = engine_case.stopped_and_resumed(case, f"prior{both}", **own)
    assert parts == whole


def test_prompts_without_weight_are_told(case) -> None:
    warnings = load(case.settings(prior_prompts=PROMPT), catalogue()).warnings
    assert any("prior_prompts" in str(one) and "no effect" in str(one) for one in warnings)


def test_more_ordinary_prompts_than_pictures_in_a_step_are_counted_as_memory(case, tmp_path) -> None:
    """Six rows against one picture: the peak is that of a training with six pictures in a step."""
    model, found = load_model(case.model), {}
    for name, changes in {
        "alike": {"train_batch_size": 1, "prior_loss_weight": 1.0},
        "more": {"train_batch_size": 1, "prior_loss_weight": 1.0, "prior_batch_size": 6},
        "pictures": {"train_batch_size": 6},
    }.items():
        session = engine_case.session(case, case.job(**{**OWN, **changes}), model)
        found[name] = phase_bytes(session, tmp_path)["training"]
        session.network.eject()
    assert found["more"] > 1.2 * found["alike"]
    assert found["more"] == pytest.approx(found["pictures"], rel=0.1)


LATENTS = 4 * 64 * 64 * 4
"""Bytes of the float32 latents of a picture of 512 × 512."""


def test_ordinary_prompts_take_32_mb_of_main_memory_and_none_of_the_device(case, monkeypatch) -> None:
    """On a device that is not the CPU: tensors without data, whose place is known all the same."""
    seen: list[torch.device] = []

    def drawn(at, prompts, steps, purpose, answered, highest):
        with FakeTensorMode():
            for number in range(len(prompts) * steps):
                x, target = (torch.zeros(1, 4, 64, 64, device="meta") for _ in range(2))
                yield State(x, torch.full((1,), number, device="meta"), PROMPT, None, target)

    def predict(x, t, text, ids):
        seen.extend((x.device, t.device))
        return x

    monkeypatch.setattr("trainer.stages.prior.trajectories", drawn)
    kit = SimpleNamespace(
        predict=predict, text=lambda prompts: None, loss=lambda got, wanted, t: got - wanted,
        process=Diffusion(scaled_linear_alphas()),
    )  # fmt: skip
    notes: list[str] = []
    at = SimpleNamespace(
        kit=kit, seed=1, model=SimpleNamespace(device=torch.device("meta")), tell=notes.append,
        stopping=lambda: False, progress=lambda *facts: None,
    )  # fmt: skip
    stage = Prior(case.job(prior_loss_weight=1.0, prior_batch_size=3))
    stage.prepare(at)
    assert len(stage._states) == 256 and {tensor.device.type for state in stage._states
                                          for tensor in (state.x, state.t, state.target)} == {"cpu"}  # fmt: skip
    assert sum(state.nbytes for state in stage._states) == 256 * (2 * LATENTS + 8) == 33_556_480
    assert notes[-1].endswith("they take 32 MB of main memory.")
    stage.step(None, 0, 10)
    assert stage.penalty(None).device.type == "meta" and {device.type for device in seen} == {"meta"}


def test_the_bank_and_the_latents_of_pictures_take_main_memory_and_none_of_the_device() -> None:
    with FakeTensorMode():
        x, t = torch.zeros(2, 4, 64, 64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    batch = Batch(0, (0, 1), 2, ("a", "b"), x, x, targets=("a", "b"))
    kept = _answered(SimpleNamespace(), batch, x, t, x, 0.0)
    assert {tensor.device.type for tensor in (kept.x, kept.t, kept.wanted)} == {"cpu"}
    assert {tensor.device.type for tensor in Bank([kept], 2).rows(batch)[1:]} == {"meta"}
    assert sum(tensor.nbytes for tensor in (kept.x, kept.t, kept.wanted)) == 2 * (2 * LATENTS + 8)
    cache = TensorCache(None)
    cache.put("picture", {"mean": torch.zeros(4, 64, 64, dtype=torch.float16), "std": torch.ones(4, 64, 64)})
    entry = cache.get("picture")
    assert sum(tensor.nbytes for tensor in entry.values()) == 2 * LATENTS == 131_072
    assert {tensor.device.type for tensor in entry.values()} == {"cpu"}
