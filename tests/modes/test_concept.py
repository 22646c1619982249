"""Modes that learn from prompts alone: iLECO against its formula and TrainTrain's rule, its cost, bank and rows."""

from __future__ import annotations

import json
from collections import Counter

import engine_case
import pytest
import tiny
import torch

from trainer.engine import loop
from trainer.engine.arguments import prompts as prompts_of
from trainer.engine.catalogue import catalogue
from trainer.engine.run import Request, run
from trainer.engine.sources import PromptPairs
from trainer.errors import JobError, TrainingError
from trainer.events import EventLog, Note
from trainer.maths import rng
from trainer.models.load import load_model
from trainer.params.codec import load
from trainer.stages.start import factors, weight_gradients

pytestmark = pytest.mark.usefixtures("no_estimate")

ILECO = {
    "mode": "iLECO",
    "lora_data_directory": "",
    "original prompt": "red",
    "target prompt": "blue",
    "train_iterations": 4,
    "train_min_timesteps": 500,
    "network_element": "CrossAttention",
    "data_cache": "memory",
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("concept"))


@pytest.fixture(scope="module")
def model(case):
    return load_model(case.model)


@pytest.fixture
def session(case, model):
    """Builds sessions of a job and ejects their adapters afterwards."""
    built = []

    def make(**changes):
        job = case.job(**{**ILECO, **changes})
        made = engine_case.session(case, job, model)
        built.append(made)
        for adapter in made.network:  # an adapter that does something
            adapter.get_parameter("up").data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        return made

    yield make
    for made in reversed(built):
        made.network.eject()


@pytest.fixture
def built(monkeypatch):
    """Sessions on tiny models in memory, by family."""
    made = []

    def make(case, kind, v_pred=False, **changes):
        job = case.job(**{**ILECO, **changes})
        made.append(engine_case.session(case, job, tiny.model(kind, v_pred=v_pred)))
        stream = torch.Generator().manual_seed(7)
        for flat in made[-1].flat.values:
            flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))
        return made[-1]

    yield make
    for one in made:
        one.network.eject()


def start(case, model, *listeners, **changes):
    log = EventLog(*listeners)
    return run(Request(case.job(**{**ILECO, "save_overwrite": True, **changes}), case.places, model=model), log)


def drawn(session, index, fixed=False):
    """x and t of micro batch `index` by the rule that draws are keyed by (purpose, seed, step, sample)."""
    shape, samples = session.source.batch(index).mean.shape[1:], range(2)
    x = rng.normal(shape, "noise", 3, 0 if fixed else index, samples)
    return x, (500 + rng.uniform("timestep", 3, index, samples) * 500).floor().long()


def predicted(session, x, t, prompts, strength):
    with torch.no_grad(), session.network.at_strength(strength):
        return session.model.predict(x, t, session.model.encode_prompts(prompts))


# ---------------------------------------------------------------------------------------------------- iLECO


def test_every_pair_and_every_anchor_gets_its_turn():
    for count in (1, 2, 3, 4, 7):
        originals = tuple(f"o{n}" for n in range(count))
        anchors = ("", "a", "b")
        pairs = PromptPairs(originals, tuple(f"t{n}" for n in range(count)), (64, 64), anchors)
        rows = [pairs.row(number) for number in range(2 * count * len(anchors))]
        met = Counter(rows)
        assert all(met[(f"o{n}", f"t{n}")] == len(anchors) for n in range(count))
        assert sum(met[(anchor, anchor)] for anchor in anchors) == len(rows) / 2
        assert all(met[(anchor, anchor)] == count for anchor in anchors)
    assert PromptPairs(("o",), ("t",), (64, 64)).row(1) == ("o", "t")


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_loss_is_the_formula(session, guidance):
    made = session(ileco_anchors="green", ileco_anchor_weight=0.25, ileco_guidance=guidance)
    for index, anchor in ((0, ""), (1, "green")):
        batch = made.source.batch(index)
        assert batch.prompts == ("red", anchor) and batch.targets == ("blue", anchor)
        x, t = drawn(made, index)
        student = predicted(made, x, t, ["red", anchor], 1.0)
        wanted = predicted(made, x, t, ["blue", anchor], 0.0)
        wanted[0] += guidance * (wanted[0] - predicted(made, x, t, ["red", anchor], 0.0)[0])
        snr = made.model.process.snr(t)
        expected = ((student - wanted) ** 2).mean((1, 2, 3)) * torch.clamp(5 / snr, max=1) * torch.tensor([1, 0.25])
        loss = made.mode.loss(made.kit, batch)
        assert torch.allclose(loss.detach(), expected, rtol=1e-4) and expected.min() > 0
        loss.sum().backward()
        assert all(bool(adapter.down.grad.any()) for adapter in made.network)


def test_an_empty_target_removes_and_noise_is_fresh(session):
    made = session(**{"target prompt": "", "ileco_anchor_weight": 0})
    x, t = drawn(made, 3)
    wanted = predicted(made, x, t, ["", ""], 0.0)
    expected = ((predicted(made, x, t, ["red", "red"], 1.0) - wanted) ** 2).mean((1, 2, 3))
    expected *= torch.clamp(5 / made.model.process.snr(t), max=1)
    assert torch.allclose(made.mode.loss(made.kit, made.source.batch(3)).detach(), expected, rtol=1e-4)
    assert not torch.equal(drawn(made, 3)[0], drawn(made, 4)[0])


def test_the_seeds_rule_is_reproduced(case, model, session):
    """TrainTrain's loop written down again: one noise for the whole run, a timestep for each sample also when one for
    the batch is asked for, no anchor, AdamW, cosine, no clipping.
    """
    from diffusers.optimization import get_scheduler

    changes = {"train_traintrain_compatible": True, "train_fixed_timsteps_in_batch": True}
    made = session(**changes)
    assert made.limits.max_grad_norm == 0
    for adapter in made.network:
        adapter.get_parameter("up").data.zero_()
    optimizer = torch.optim.AdamW([p for p in made.network.parameters()], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=4)
    noise, _ = drawn(made, 0)
    losses = []
    for step in range(4):
        _, t = drawn(made, step)
        wanted = predicted(made, noise, t, ["blue", "blue"], 0.0)
        student = made.model.predict(noise, t, made.model.encode_prompts(["red", "red"]))
        loss = ((student - wanted) ** 2).mean((1, 2, 3)) * torch.clamp(5 / made.model.process.snr(t), max=1)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach().mean()))
    made.network.eject()
    try:
        trace = engine_case.Trace()
        start(case, model, trace, save_lora_name="seed", **changes)
    finally:
        made.network.attach()
    assert list(trace.losses.values()) == pytest.approx(losses, rel=1e-4)


def test_the_seeds_min_snr_weight_is_that_of_epsilon_for_v_too(case, built):
    for compatible in (False, True):
        made = built(case, "sd2", v_pred=True, train_traintrain_compatible=compatible, ileco_anchor_weight=0)
        x, t = drawn(made, 0)
        error = predicted(made, x, t, ["red", "red"], 1.0) - predicted(made, x, t, ["blue", "blue"], 0.0)
        snr = made.model.process.snr(t)
        weight = torch.clamp(5 / snr, max=1) if compatible else snr.clamp(max=5) / (snr + 1)
        expected = (error**2).mean((1, 2, 3)) * weight
        assert torch.allclose(made.mode.loss(made.kit, made.source.batch(0)).detach(), expected, rtol=1e-4)


class Passes:
    """Counts rows that go through the UNet: forward without and with gradient, and back."""

    def __init__(self, unet):
        self.teacher = self.student = self.back = 0
        self._handle = unet.register_forward_hook(self._look)

    def _look(self, module, inputs, output):
        rows = len(inputs[0])
        if not torch.is_grad_enabled():
            self.teacher += rows
            return
        self.student += rows
        output[0].register_hook(lambda gradient: setattr(self, "back", self.back + len(gradient)))

    def units(self, rows):
        self._handle.remove()
        return (self.teacher + self.student + self.back) / rows


LINES_3 = {"original prompt": "red\ncat\nhat", "target prompt": "blue\ndog\n"}
COSTS = [
    ("sd1", {}, 3),
    ("sd1", {"train_traintrain_compatible": True}, 3),
    ("sd1", LINES_3, 3),
    ("sd1", {"ileco_guidance": 1}, 3.5),  # one more forward for every second row
    ("sd1", {"ileco_bank": 8}, 2),
    ("sd1", {"ileco_bank": 8, "ileco_guidance": 1}, 2),
    ("sdxl", LINES_3, 3),
    ("sdxl", {"ileco_bank": 8}, 2),
]


@pytest.mark.parametrize(("kind", "changes", "units"), COSTS)
def test_passes_through_the_unet_per_step(case, built, kind, changes, units):
    """Rows forward and back in whole optimizer steps, in units of the batch."""
    made = built(case, kind, **changes)
    counted = Passes(made.model.unet)
    for _ in range(2):
        loop.optimizer_step(made, None)
    assert counted.units(2 * 2) == units


def test_sizes_are_pixels_and_every_prompt_has_its_own_pooled_text(case, built):
    """On SDXL: the formula once more, with the sizes written by hand."""
    made = built(case, "sdxl", **{"image_size(height, width)": "64,128", "ileco_anchors": "green"})
    batch = made.source.batch(1)
    x, t = drawn(made, 1)
    assert x.shape[2:] == (8, 16)
    ids = torch.tensor([[64.0, 128, 0, 0, 64, 128]]).repeat(2, 1)

    def at(prompts, strength):
        with torch.no_grad(), made.network.at_strength(strength):
            return made.model.predict(x, t, made.model.encode_prompts(prompts), ids)

    wanted, student = at(["blue", "green"], 0.0), at(["red", "green"], 1.0)
    expected = ((student - wanted) ** 2).mean((1, 2, 3)) * torch.clamp(5 / made.model.process.snr(t), max=1)
    assert torch.allclose(made.mode.loss(made.kit, batch).detach(), expected, rtol=1e-4)


def test_the_bank_holds_the_models_own_states_and_answers(session):
    made = session(ileco_bank=24, ileco_anchors="green", train_max_timesteps=900, ileco_guidance=0.5)
    bank = made.mode._bank
    assert 24 <= len(bank) * 2 <= 24 + 2 * 20 and bank.share == 2
    seen = set()
    for index in range(len(bank)):
        batch, x, t, wanted = bank.rows(made.source.batch(index))
        for row, (own, to) in enumerate(zip(batch.prompts, batch.targets, strict=True)):
            seen.add((own, to, row, int(t[row])))
            assert 500 <= t[row] < 900
            one = x[row : row + 1], t[row : row + 1]
            expected = predicted(made, *one, [to], 0.0)
            expected += 0.5 * (expected - predicted(made, *one, [own], 0.0))
            assert torch.allclose(wanted[row], expected[0], atol=1e-5)
    assert len({(row, t) for _, _, row, t in seen}) > 10
    assert {own for own, *_ in seen} == {"red", "", "green"}  # each state of each column comes up once a round


def test_a_run_with_a_bank_resumes_with_the_same_losses(case):
    changes = {**ILECO, "ileco_bank": 12, "train_iterations": 9}
    resumed, whole = engine_case.stopped_and_resumed(case, "bank", **changes)
    assert resumed == whole and len(whole) == 9


def test_lora_ga_starts_from_the_gradient_of_the_loss_with_the_bank(case, model):
    """The gradient of the first batch of the bank, taken again when everything stands."""
    job = case.job(**{**ILECO, "ileco_bank": 8, "network_init": "lora_ga"})
    made = engine_case.session(case, job, model)
    try:
        adapter = next(iter(made.network))
        batch = made.source.batch(0)
        (gradient,) = weight_gradients([adapter.module], lambda: made.mode.loss(made.kit, batch))
        down, _ = factors("lora_ga", gradient, adapter.rank, adapter.scale, rng.generator("lora_ga", adapter.key))
        torch.testing.assert_close(adapter.down0.flatten(1), down, rtol=1e-3, atol=1e-4)
        made.mode._bank = None
        (other,) = weight_gradients([adapter.module], lambda: made.mode.loss(made.kit, batch))
        assert (other - gradient).norm() > 0.1 * gradient.norm()
    finally:
        made.network.eject()


def test_a_bank_without_a_state_in_range_is_refused(case, model):
    with pytest.raises(TrainingError, match="ileco_bank"):
        start(case, model, ileco_bank=4, train_min_timesteps=997, train_max_timesteps=998)


# ---------------------------------------------------------------------------------------------- bad input


def problems(case, **changes):
    with pytest.raises(JobError) as caught:
        case.job(**{**ILECO, **changes})
    return {problem.field: problem.message for problem in caught.value.problems}


def test_bad_prompts_are_told_at_their_field_before_anything_is_loaded(case):
    assert "has 1 line(s), the original prompt has 2" in problems(case, **{"original prompt": "a\nb"})["target prompt"]
    assert "same as the target" in problems(case, **{"target prompt": "red"})["original prompt"]
    assert "what is to be changed" in problems(case, **{"original prompt": "", "target prompt": ""})["original prompt"]
    for name, value in {"ileco_anchors": "green", "ileco_bank": 8}.items():
        assert "train_traintrain_compatible" in problems(case, train_traintrain_compatible=True, **{name: value})[name]
    removing = case.settings(**{**ILECO, "original prompt": "a\nb", "target prompt": ""})
    assert not any("prompt" in line for line in load(removing, catalogue()).warnings)


LINES = [
    ("red", "blue", [("red", "blue")]),
    (" red \ncat", "blue\n dog", [("red", "blue"), ("cat", "dog")]),
    ("red\ncat\n", "blue\ndog\n\n", [("red", "blue"), ("cat", "dog")]),
    ("red\ncat", "blue\n", [("red", "blue"), ("cat", "")]),
    ("red\ncat", "\ndog", [("red", ""), ("cat", "dog")]),
    ("red\ncat", "", [("red", ""), ("cat", "")]),
    ("\ncat", "grey\ndog", [("", "grey"), ("cat", "dog")]),
]


@pytest.mark.parametrize(("original", "target", "expected"), LINES)
def test_line_i_belongs_to_line_i(case, original, target, expected):
    pairs = prompts_of(case.job(**{**ILECO, "original prompt": original, "target prompt": target}))
    assert list(zip(pairs.originals, pairs.targets, strict=True)) == expected
    rows = {pairs.row(number) for number in range(64)}
    assert {row for row in rows if row[0] != row[1]} == set(expected)


def test_no_anchor_stands_against_what_is_to_change(case):
    def anchors(**changes):
        return prompts_of(case.job(**{**ILECO, "target prompt": "x", **changes})).anchors

    plain = anchors()
    assert plain[0] == "" and {"a photo", "a person", "an animal"} <= set(plain)
    assert set(plain) - set(anchors(**{"original prompt": "A person with a photo"})) == {"a photo", "a person"}
    assert anchors(**{"original prompt": ""}) == ()
    assert anchors(**{"original prompt": "", "ileco_anchors": "cat"}) == ("cat",)
    assert anchors(ileco_anchors="cat\n\n a person ") == ("", "cat", "a person")
    told = problems(case, ileco_anchors="green\nred")
    assert "'red'" in told["ileco_anchors"] and "both change and stay" in told["ileco_anchors"]


def test_an_instant_start_needs_words(case):
    """The preset starts that way: an empty prompt has no word whose meaning could change."""
    changes = {"original prompt": "", "network_init": "instant"}
    assert "choose default" in problems(case, **changes)["original prompt"]


def test_an_empty_original_is_warned_of(case):
    given = case.settings(**{**ILECO, "original prompt": "red\n\ncat", "target prompt": "a\nb\nc"})
    (line,) = (line for line in load(given, catalogue()).warnings if "prompt" in line)
    assert "affect every image" in line


def test_traintrains_text_is_one_prompt(case):
    given = json.loads(json.dumps({**case.settings(**ILECO), "original prompt": "red,\nsmall"}))
    given = {key: value for key, value in given.items() if key != "format" and not key.startswith("ileco")}
    assert prompts_of(load(given, catalogue()).job).originals == ("red,\nsmall",)


def test_prompts_longer_than_the_window_are_told_before_loading(case):
    trace = engine_case.Trace()
    longer = "x" * 90
    case.run(trace, dry=True, **{**ILECO, "target prompt": longer, "save_lora_name": "long"})
    notes = [event.text for event in trace.events if isinstance(event, Note)]
    told = next(n for n, text in enumerate(notes) if "90 tokens" in text)
    assert "parts of 75" in notes[told] and told < next(n for n, text in enumerate(notes) if "Loading" in text)
