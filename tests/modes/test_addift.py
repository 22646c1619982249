"""ADDifT and Multi-ADDifT: the loss against closed forms, one forward for both directions, and whole runs."""

from __future__ import annotations

import contextlib
import dataclasses

import engine_case
import numpy as np
import pair_case
import pytest
import tiny
import torch

from trainer.adapters.base import ADAPTERS
from trainer.engine import loop
from trainer.engine.kit import Kit, LossSettings
from trainer.errors import AtelierError, JobError
from trainer.maths.alphas import scaled_linear_alphas
from trainer.maths.process import Diffusion
from trainer.models.load import load_model
from trainer.modes.addift import Addift
from trainer.modes.base import MODES, Batch

pytestmark = pytest.mark.usefixtures("no_estimate")


class LinearModel:
    """ε_κ(x, t, c) = (w + κ·d)·x + b(c) with one trainable number d: everything about it can be worked out by hand."""

    w, b = 0.7, {"before": 0.2, "after": -0.1}

    def __init__(self, d: float, prediction: str = "epsilon", distance: str = "MSE") -> None:
        self.process = Diffusion(scaled_linear_alphas(), prediction)
        self.d = torch.tensor(d, dtype=torch.float64, requires_grad=True)
        self.kappa: object = 1.0
        self.per_sample = True
        self.calls: list[int] = []

    def pair(self, batch):
        return batch.mean.double(), batch.target_mean.double()

    def noise(self, batch, fixed=False, purpose="noise"):
        return torch.full_like(batch.mean, 0.3 if purpose == "noise" else -1.1).double()

    def timesteps(self, batch, strata=1):
        return torch.tensor([600, 900])[: len(batch.samples)]

    def text(self, prompts):
        return torch.tensor([self.b[prompt] for prompt in prompts], dtype=torch.float64).view(-1, 1, 1, 1)

    def predict(self, x, t, text, ids=None):
        self.calls.append(len(x))
        kappa = self.kappa.double().view(-1, 1, 1, 1) if isinstance(self.kappa, torch.Tensor) else self.kappa
        return (self.w + kappa * self.d) * x + text

    @contextlib.contextmanager
    def strength(self, value):
        before, self.kappa = self.kappa, value
        yield
        self.kappa = before

    @contextlib.contextmanager
    def teacher(self):
        with self.strength(0.0), torch.no_grad():
            yield

    def loss(self, predicted, target, t, mask=None):
        weight = 1 if mask is None else mask / mask.mean((1, 2, 3), keepdim=True)
        return ((predicted - target) ** 2 * weight).mean((1, 2, 3))


def mode(**changes):
    from trainer.engine.catalogue import catalogue
    from trainer.params.codec import load

    given = {"format": 1, "mode": "ADDifT", "original image": "a.png", "target image": "b.png", **changes}
    return Addift.of(load(given, catalogue()).job)


def pair_batch(count: int = 2, index: int = 0, mask=None) -> Batch:
    numbers = np.random.default_rng(4).normal(size=(2, count, 4, 2, 2))
    original, target = (torch.tensor(one, dtype=torch.float32) for one in numbers)
    prompts = {"prompts": ("before",) * count, "targets": ("after",) * count}
    return Batch(
        index=index, samples=tuple(range(count)), share=count, mean=original, std=original * 0, target_mean=target,
        target_std=target * 0, mask=mask, **prompts,
    )  # fmt: skip


def by_hand(d, signs, prediction="epsilon", weights=None, batch=None):
    """The loss per pair in NumPy, straight from the definition."""
    batch = batch or pair_batch()
    z_o, z_t = batch.mean.double().numpy(), batch.target_mean.double().numpy()
    alphas = scaled_linear_alphas().double().numpy()[[600, 900]][: len(z_o)].reshape(-1, 1, 1, 1)
    a, s = np.sqrt(alphas), np.sqrt(1 - alphas)
    losses = []
    for sign, kappa in signs:
        seen, shown = (z_o, z_t) if sign > 0 else (z_t, z_o)
        teacher = 0.7 * (a * seen + s * 0.3) + 0.2
        if prediction == "v_prediction":  # the same noise, read from v at either state: ε̂ = √ᾱ·v + √(1−ᾱ)·x
            implied = a * teacher + s * (a * seen + s * 0.3)
            teacher = (implied - s * (a * shown + s * 0.3)) / a
        student = (0.7 + kappa * d) * (a * shown + s * 0.3) - 0.1
        square = (student - teacher) ** 2
        losses.append((square if weights is None else square * weights).mean((1, 2, 3)))
    return np.mean(losses, axis=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_definition_worked_out_by_hand(prediction):
    kit = LinearModel(0.4, prediction)
    loss = mode().loss(kit, pair_batch())
    expected = by_hand(0.4, [(1, 0.25), (-1, -0.25)], prediction)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6)
    assert kit.calls == [4, 4]  # one forward of the teacher, one of the student, both directions in each


def test_strength_and_ratio_are_those_of_the_job():
    kit = LinearModel(0.4)
    loss = mode(diff_strength=0.5, diff_alt_ratio=0.3).loss(kit, pair_batch())
    np.testing.assert_allclose(loss.detach().numpy(), by_hand(0.4, [(1, 0.5), (-1, -0.15)]), rtol=1e-6)


def test_ratio_zero_trains_one_direction_only():
    kit = LinearModel(0.4)
    loss = mode(diff_alt_ratio=0).loss(kit, pair_batch())
    np.testing.assert_allclose(loss.detach().numpy(), by_hand(0.4, [(1, 0.25)]), rtol=1e-6)
    assert kit.calls == [2, 2]


def test_a_negative_ratio_holds_pure_noise_where_it_is():
    """(−) half: student and teacher see the same pure noise; at d = 0 only the prompts differ there, by 0.3."""
    kit = LinearModel(0.0)
    loss = mode(diff_alt_ratio=-1).loss(kit, pair_batch())
    expected = (by_hand(0.0, [(1, 0.25)]) + 0.3**2) / 2
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6)
    a, s = (value.view(-1).double() for value in kit.process.signal(torch.tensor([600, 900]), torch.zeros(2, 1)))
    pure = a * -1.1 + s * 0.3  # x of the half at these timesteps, alike in every element
    kit = LinearModel(0.4)
    loss = mode(diff_alt_ratio=-0.5).loss(kit, pair_batch())
    expected = (by_hand(0.4, [(1, 0.25)]) + ((-0.125 * 0.4 * pure - 0.3) ** 2).numpy()) / 2
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)


def test_training_ends_at_the_least_squares_solution():
    """With one number to learn the minimum is known: d* = Σ κx(wanted − base) / Σ (κx)² over both directions."""
    batch = pair_batch()
    z_o, z_t = batch.mean.double().numpy(), batch.target_mean.double().numpy()
    alphas = scaled_linear_alphas().double().numpy()[[600, 900]].reshape(-1, 1, 1, 1)
    a, s = np.sqrt(alphas), np.sqrt(1 - alphas)
    x_o, x_t = a * z_o + s * 0.3, a * z_t + s * 0.3
    rows = np.concatenate([0.25 * x_t, -0.25 * x_o]).ravel()
    wanted = np.concatenate([0.7 * x_o + 0.3 - 0.7 * x_t, 0.7 * x_t + 0.3 - 0.7 * x_o]).ravel()
    solution = rows @ wanted / (rows @ rows)

    kit, trained = LinearModel(0.0), mode()
    optimizer = torch.optim.LBFGS([kit.d], lr=1, max_iter=20)

    def closure():
        optimizer.zero_grad()
        loss = trained.loss(kit, batch).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(kit.d.detach()) == pytest.approx(solution, rel=1e-5)


def test_the_mask_is_normalised_and_traintrains_is_not():
    mask = torch.zeros(2, 1, 2, 2)
    mask[:, :, 0, 1] = 1
    kit = LinearModel(0.4)
    loss = mode().loss(kit, pair_batch(mask=mask))
    signs = [(1, 0.25), (-1, -0.25)]
    np.testing.assert_allclose(loss.detach().numpy(), by_hand(0.4, signs, weights=mask.numpy() * 4), rtol=1e-6)
    loss = mode(train_traintrain_compatible=True).loss(kit, pair_batch(mask=mask))
    assert kit.calls[2:] == [2, 2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_projected_the_goal_is_the_own_prediction_and_what_points_along_the_difference(prediction):
    kit, batch, ridge = LinearModel(0.4, prediction), pair_batch(), 0.01
    loss = mode(diff_project=True).loss(kit, batch)
    z_o, z_t = batch.mean.double().numpy(), batch.target_mean.double().numpy()
    alphas = scaled_linear_alphas().double().numpy()[[600, 900]].reshape(-1, 1, 1, 1)
    a, s = np.sqrt(alphas), np.sqrt(1 - alphas)
    losses = []
    for seen, shown, kappa in ((z_o, z_t, 0.25), (z_t, z_o, -0.25)):
        x, d = a * shown + s * 0.3, shown - seen
        asked = 0.7 * (a * seen + s * 0.3) + 0.2 - (s * d if prediction == "v_prediction" else 0)
        own = 0.7 * x - 0.1
        wanted = own.copy()
        for pair, row, column in np.ndindex(2, 2, 2):  # place by place, over the four channels
            here, change = d[pair, :, row, column], (asked - own)[pair, :, row, column]
            least = ridge * (d[pair] ** 2).sum(0).max()
            wanted[pair, :, row, column] += here * (change @ here) / (here @ here + least)
        losses.append((((0.7 + kappa * 0.4) * x - 0.1 - wanted) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(loss.detach().numpy(), np.mean(losses, axis=0), rtol=1e-6)
    assert kit.calls == [4, 4, 4]  # the untouched model on both sides, and one forward of the student


def test_projected_pure_noise_is_held_at_the_own_prediction():
    kit, rule = LinearModel(0.0), {"diff_project": True}
    both = mode(diff_alt_ratio=-1, **rule).loss(kit, pair_batch())
    one = mode(diff_alt_ratio=0, **rule).loss(kit, pair_batch())
    assert one.min() > 0 and torch.allclose(both, one / 2)  # nothing to learn from noise, not even another prompt


def test_traintrain_knows_no_projection():
    """With its rules the switch is reported to have no effect, and has none."""
    from trainer.engine.catalogue import catalogue
    from trainer.params.codec import load

    rule = {"train_traintrain_compatible": True}
    losses = [mode(**rule, diff_project=on).loss(LinearModel(0.4), pair_batch()) for on in (True, False)]
    assert torch.equal(*losses)
    given = {"format": 1, "mode": "ADDifT", "original image": "a.png", "target image": "b.png", "diff_project": True}
    told = load({**given, **rule}, catalogue()).warnings
    assert any("diff_project" in one and "has no effect with train_traintrain_compatible" in one for one in told)


def test_projected_directions_that_take_turns_are_those_of_one_forward_and_the_mask_counts():
    mask = torch.zeros(2, 1, 2, 2)
    mask[:, :, 0, 1] = 1
    single = LinearModel(0.4)
    single.per_sample = False
    apart = [mode(diff_project=True).loss(single, pair_batch(index=index, mask=mask)) for index in range(2)]
    together = mode(diff_project=True).loss(LinearModel(0.4), pair_batch(mask=mask))
    torch.testing.assert_close((apart[0] + apart[1]) / 2, together)
    assert not torch.allclose(mode(diff_project=True).loss(LinearModel(0.4), pair_batch()), together)


def test_traintrains_steps_go_in_turns_through_five_timesteps():
    seen: list[tuple[int, float]] = []

    class Watching(LinearModel):
        def loss(self, predicted, target, t, mask=None):
            seen.append((int(t[0]), float(self.kappa if not isinstance(self.kappa, torch.Tensor) else 99)))
            return super().loss(predicted, target, t, mask)

        def predict(self, x, t, text, ids=None):
            self.last = self.kappa
            return super().predict(x, t, text, ids)

    for low, high, expected in ((500, 1000, (550, 650, 750, 850, 950)), (200, 400, (220, 260, 300, 340, 380))):
        seen.clear()
        trained = mode(train_traintrain_compatible=True, train_min_timesteps=low, train_max_timesteps=high)
        strengths = []
        for index in range(20):
            kit = Watching(0.4)
            trained.loss(kit, pair_batch(1, index))
            strengths.append(kit.last)
        assert [t for t, _ in seen] == [value for value in expected * 2 for _ in range(2)]
        assert strengths == [0.25, -0.25] * 10


def test_adapters_that_know_one_strength_take_turns_with_the_same_noise():
    seen = []

    class Single(LinearModel):
        def noise(self, batch, fixed=False, purpose="noise"):
            seen.append(batch.index)
            return super().noise(batch, fixed, purpose)

    kit = Single(0.4)
    kit.per_sample = False
    losses = [mode().loss(kit, pair_batch(index=index)).detach().numpy() for index in range(4)]
    np.testing.assert_allclose(losses[0], by_hand(0.4, [(1, 0.25)]), rtol=1e-6)
    np.testing.assert_allclose(losses[3], by_hand(0.4, [(-1, -0.25)]), rtol=1e-6)
    assert seen == [0, 0, 1, 1] and kit.calls == [2] * 8


def test_timesteps_are_stratified_over_the_whole_range():
    model = tiny.model("sd1")
    kit = Kit(model, _Network(), None, 5, LossSettings(low=200, high=400))
    many = [kit.timesteps(dataclasses.replace(pair_batch(2), index=index), 10) for index in range(100)]
    drawn = torch.cat(many)
    parts = (drawn - 200).div(20, rounding_mode="floor").view(20, 10)
    assert all(sorted(block.tolist()) == list(range(10)) for block in parts)
    assert len(set(drawn.tolist())) > 100  # not five fixed values
    assert len({tuple(block.tolist()) for block in parts}) > 15
    fixed = Kit(model, _Network(), None, 5, LossSettings(low=0, high=1000, fixed_timesteps=True))
    whole = torch.stack([fixed.timesteps(dataclasses.replace(pair_batch(2), index=index), 10) for index in range(10)])
    assert (whole[:, 0] == whole[:, 1]).all() and sorted((whole[:, 0] // 100).tolist()) == list(range(10))


class _Network:
    strength = type("Strength", (), {"value": 1.0})


# -------------------------------------------------------------------- on real, tiny models


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return pair_case.make(tmp_path_factory.mktemp("pairs"))


@contextlib.contextmanager
def session(case, model=None, **changes):
    """A built session of a job, ready for its first step; its adapter is given a small random ΔW."""
    made = engine_case.session(case, case.job(**changes), model or load_model(case.model))
    stream = torch.Generator().manual_seed(7)
    for flat in made.flat.values:
        flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))
    try:
        yield made
    finally:
        made.network.eject()


def counted(made):
    """(samples, whether it is differentiated) of every UNet forward in one step."""
    calls = []
    hook = made.model.unet.register_forward_pre_hook(
        lambda _, given: calls.append((len(given[0]), torch.is_grad_enabled()))
    )
    loss = loop.gradients(made, made.step)
    hook.remove()
    return calls, loss


def test_a_step_is_one_forward_without_and_one_with_gradient(case):
    with session(case, train_batch_size=3) as made:
        calls, _ = counted(made)
        assert calls == [(6, False), (6, True)]
    with session(case, train_batch_size=3, diff_project=True) as made:
        calls, _ = counted(made)
        assert calls == [(6, False), (6, False), (6, True)]


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_both_directions_in_one_forward_are_each_direction_alone(case, name, monkeypatch):
    """With every adapter type, on UNet and text encoder: the gradient is the mean of those of the two directions."""
    model = load_model(case.model)
    extra = {"network_train_text_encoder": True, "network_blocks(BASE = TextEncoder)": ["BASE", "M00", "OUT00"]}
    with session(case, model, network_type=name, **extra) as made:
        if not made.kit.per_sample:
            pytest.skip(f"{name} takes one strength for all samples")
        calls, together = counted(made)
        assert len(calls) == 2
        both = [gradient.clone() for gradient in made.flat.gradients]
        monkeypatch.setattr(Kit, "per_sample", False)
        apart = []
        for step in range(2):
            loss = loop.gradients(made, step)
            apart.append((loss, [gradient.clone() for gradient in made.flat.gradients]))
    assert float(together) == pytest.approx(sum(float(loss) for loss, _ in apart) / 2, rel=1e-4)
    for one, forward, backward in zip(both, apart[0][1], apart[1][1], strict=True):
        mean = (forward + backward) / 2
        assert (one - mean).norm() <= 2e-3 * mean.norm() + 1e-8 and mean.norm() > 0


def test_gradient_checkpointing_gives_the_same_gradient(case):
    """The forward that is computed again in the backward pass has the strengths of the first."""
    found = []
    for on in (False, True):
        with session(case, use_gradient_checkpointing=on) as made:
            loop.gradients(made, 0)
            found.append([gradient.clone() for gradient in made.flat.gradients])
            made.model.set_gradient_checkpointing(False)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)
        assert plain.norm() > 0


def test_long_prompts_keep_their_strengths_in_a_trained_text_encoder(case):
    """A prompt of several chunks fills several rows of the text encoder's batch, all with its sample's strength."""
    prompts = {"original prompt": "a circle" * 4, "target prompt": "b " * 90, "network_train_text_encoder": True}
    with session(case, train_batch_size=1, **prompts) as made:
        strengths = torch.tensor([0.5, -1.5])
        text = [made.job.value("target prompt"), made.job.value("original prompt")]
        with torch.no_grad():
            with made.kit.strength(strengths):
                together = made.kit.text(text).context_BLD
            for row, strength in enumerate((0.5, -1.5)):
                with made.kit.strength(strength):
                    alone = made.kit.text(text).context_BLD
                torch.testing.assert_close(together[row], alone[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "prediction"),
    [("ADDifT", "sd1", "epsilon"), ("ADDifT", "sd2", "v_prediction"), ("Multi-ADDifT", "sdxl", "epsilon")],
)
def test_runs_of_every_family(tmp_path, name, kind, prediction):
    case = pair_case.make(tmp_path, kind, prediction)
    trace = engine_case.Trace()
    result = case.run(trace, mode=name, diff_use_diff_mask=True, train_iterations=2, train_batch_size=2)
    assert result.path.is_file() and len(trace.losses) == 2
    assert engine_case.csv_losses(result.folder) == trace.losses
    assert result.report["modules"].keys() == {"unet"}  # the text encoder only when asked for
    assert result.report["prediction"] == prediction


def test_stopped_and_resumed_is_the_same_run(case):
    for name in ("ADDifT", "Multi-ADDifT"):
        resumed, whole = engine_case.stopped_and_resumed(case, name, mode=name, diff_alt_ratio=-0.5)
        assert resumed == whole and len(whole) == 9


def test_reverted_pairs_train_the_opposite(case):
    with session(case) as made:
        plain = made.source.batch(0)
    with session(case, diff_revert_original_target=True) as made:
        reverted = made.source.batch(0)
    assert torch.equal(plain.mean, reverted.target_mean) and torch.equal(plain.target_mean, reverted.mean)
    assert not torch.equal(plain.mean, plain.target_mean)


def test_every_pair_has_its_own_captions(case):
    with session(case, mode="Multi-ADDifT", lora_trigger_word="sks", train_batch_size=2) as made:
        batch = made.source.batch(0)
    where = "red circle on the left"
    expected = {
        (f"sks, a small {where}, white background", f"sks, a {size} {where}, black background")
        for size in ("small", "large")
    }
    assert set(zip(batch.prompts, batch.targets, strict=True)) == expected


def test_an_empty_target_prompt_is_the_original_but_not_for_traintrain(case):
    with session(case) as made:
        assert made.source.batch(0).targets == ("a circle",)
    with session(case, train_traintrain_compatible=True) as made:
        assert made.source.batch(0).targets == ("",)
    with session(case, **{"target prompt": "black"}) as made:
        assert made.source.batch(0).targets == ("black",)


def test_the_strength_is_baked_into_the_file_once(case):
    from trainer.adapters.file import read_lora

    def norm(path):
        tensors, _ = read_lora(path)
        keys = sorted(key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight"))
        sides = [[tensors[f"{key}.lora_{side}.weight"].flatten(1) for side in ("up", "down")] for key in keys]
        return torch.stack([(up @ down).norm() for up, down in sides])

    once = case.run(save_lora_name="once").path
    twice = case.run(save_lora_name="twice", network_strength=2).path
    torch.testing.assert_close(norm(twice), 2 * norm(once), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"original image": ""}, "original image.*empty"),
        ({"target image": ""}, "target image.*empty"),
        ({"target image": "nowhere.png"}, "target image.*no such file"),
        ({"target image": "a.png"}, "a.png and a.png.*nothing to learn"),
        ({"target image": "small.png"}, r"a.png and small.png \(64×64 and 32×64"),
        ({"target image": "torn.png"}, "target image torn.png"),
        ({"mode": "Difference", "target image": ""}, "target image.*empty"),
        ({"mode": "Difference", "target image": "a.png"}, "a.png and a.png.*nothing to learn"),
        ({"mode": "Difference", "target image": "small.png"}, r"a.png and small.png \(64×64 and 32×64"),
        ({"target image": "dot.png"}, "16×64 pixels; each side needs 32"),
        ({"mode": "Multi-ADDifT", "diff_target_name": ""}, "diff_target_name.*empty"),
        ({"mode": "Multi-ADDifT", "diff_target_name": "_x"}, r"a.png \(no a_x beside it\).*b_t.png"),
    ],
)
def test_bad_pairs_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, changes, words):
    from PIL import Image

    from trainer.engine import run as engine_run

    case = pair_case.PairCase(tmp_path, tmp_path / "no model", tmp_path / "pictures")
    pair_case.write_pair(case.pictures)
    pair_case.write_pair(case.pictures, name="b", seed=2)
    extra = tmp_path / "extra"
    extra.mkdir()
    Image.fromarray(pair_case.picture(pair_case.AFTER)[:, :32]).save(extra / "small.png")
    Image.fromarray(pair_case.picture(pair_case.AFTER)[:, :16]).save(extra / "dot.png")
    (extra / "torn.png").write_bytes((case.pictures / "a.png").read_bytes()[:40])
    if changes.get("target image"):
        folder = case.pictures if changes["target image"] == "a.png" else extra
        changes = {**changes, "target image": str(folder / changes["target image"])}
    monkeypatch.setattr(engine_run, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(JobError, match=f"(?s){words}") as caught:
        case.run(**changes)
    assert isinstance(caught.value, AtelierError) and not case.places.logs.exists()


def test_registered():
    assert {"ADDifT", "Multi-ADDifT"} <= set(MODES.names())
