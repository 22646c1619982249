"""ADDifT by TrainTrain's rule, written down again from what its program does, beside ours: on real, tiny models."""

from __future__ import annotations

import dataclasses

import engine_case
import pair_case
import pytest
import tiny
import torch

from trainer.data import pairs
from trainer.engine import loop
from trainer.engine.arguments import find_pair_data
from trainer.maths import rng

pytestmark = pytest.mark.usefixtures("no_estimate")


BLUE = dataclasses.replace(pair_case.BEFORE, colour="blue")  # differs on a part of the picture


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = pair_case.make(tmp_path_factory.mktemp("seed"))
    pair_case.write_pair(made.pictures, after=BLUE, name="part")
    return made


@pytest.fixture
def session(case):
    made = []

    def make(kind="sd1", v_pred=False, **changes):
        files = {
            key: str(case.pictures / name)
            for key, name in {"original image": "part.png", "target image": "part_t.png"}.items()
        }
        rates = {"train_lr_scheduler": "constant", "train_max_grad_norm": 0}
        settings = {"target prompt": "black", **files, **rates, **changes}
        made.append(engine_case.session(case, case.job(**settings), tiny.model(kind, v_pred=v_pred)))
        return made[-1]

    yield make
    for one in made:
        one.network.eject()


def mask_of():
    """The rule for a mask: pixels whose channels differ by more than 10 in all, grown by 16, one for each latent."""
    before, after = (torch.tensor(pair_case.picture(scene)).int() for scene in (pair_case.BEFORE, BLUE))
    clear = (before - after).abs().sum(2) > 10
    grown = torch.zeros(64, 64)
    for row, column in clear.nonzero().tolist():
        grown[max(row - 16, 0) : row + 17, max(column - 16, 0) : column + 17] = 1
    assert 0 < grown.mean() < 1
    return grown[::8, ::8]


@pytest.mark.parametrize(
    ("kind", "v_pred", "ratio", "masked"),
    [("sd1", False, 1.0, True), ("sd2", True, 0.5, False), ("sd1", False, -0.5, False)],
)
def test_traintrains_addift_is_reproduced(case, session, kind, v_pred, ratio, masked):
    """Losses and weights of four steps: + and − in turns, fixed timesteps, fresh noise, ε's min-SNR, AdamW."""
    rule = {"train_traintrain_compatible": True, "diff_alt_ratio": ratio, "diff_use_diff_mask": masked}
    made = session(kind, v_pred, train_min_timesteps=500, train_max_timesteps=1000, **rule)
    model, network = made.model, made.network
    start = [flat.clone() for flat in made.flat.values]
    optimizer = torch.optim.AdamW(list(network.parameters()), lr=1e-3)
    original, target = (model.encode_prompts([words]) for words in ("a circle", "black"))
    losses = []
    for step in range(4):
        batch = made.source.batch(step)
        shape = batch.mean.shape[1:]
        draw = rng.normal(shape, "posterior", 3, step, [0])
        z_original, z_target = batch.mean + batch.std * draw, batch.target_mean + batch.target_std * draw
        noise = rng.normal(shape, "noise", 3, step, [0])
        seen, shown = (z_original, z_target) if step % 2 == 0 else (z_target, z_original)
        if step % 2 and ratio < 0:
            seen = shown = noise
        t = torch.tensor([550 + 100 * (step // 2)])
        alpha = model.schedule.alphas_cumprod_T[t].double()
        x_seen, x_shown = (alpha.sqrt().float() * z + (1 - alpha).sqrt().float() * noise for z in (seen, shown))
        with torch.no_grad(), network.at_strength(0.0):
            wanted = model.predict(x_seen, t, original)
        with network.at_strength(0.25 if step % 2 == 0 else -0.25 * abs(ratio)):
            predicted = model.predict(x_shown, t, target)
        if masked:
            predicted, wanted = predicted * mask_of(), wanted * mask_of()
        loss = ((predicted - wanted) ** 2).mean() * min(5 / float(alpha / (1 - alpha)), 1)
        optimizer.zero_grad(set_to_none=False)  # the gradients are views that the engine reads
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    end = [flat.clone() for flat in made.flat.values]
    for flat, value in zip(made.flat.values, start, strict=True):
        flat.copy_(value)
    again = [float(loop.optimizer_step(made, None)) for _ in range(4)]
    assert again == pytest.approx(losses, rel=1e-4)
    for one, other, value in zip(made.flat.values, end, start, strict=True):
        assert (one - other).norm() < 1e-2 * (other - value).norm()


def test_our_mask_is_normalised(session):
    """The distance inside the mask counts as if the picture had nothing else."""
    made = session(diff_use_diff_mask=True, train_snr_gamma=0)
    one, other = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, 2:4, 5:8] = 1
    expected = ((one - other)[:, :, 2:4, 5:8] ** 2).mean()
    found = made.kit.loss(one, other, torch.tensor([500]), mask)
    torch.testing.assert_close(found, expected[None])
    shown = made.source.batch(0).mask
    assert shown.shape == (1, 1, 8, 8) and 0 < shown.mean() < 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"network_type": "c3lier"}, {"network_timestep_rank": 1}])
def test_options_know_a_strength_per_sample_too(session, options, monkeypatch):
    """Both directions in one forward have the mean gradient of the two alone, with what can be added to a type."""
    from trainer.engine.kit import Kit

    made = session(train_batch_size=2, **options)
    stream = torch.Generator().manual_seed(7)
    for flat in made.flat.values:
        flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))
    loop.gradients(made, 0)
    together = [gradient.clone() for gradient in made.flat.gradients]
    monkeypatch.setattr(Kit, "per_sample", False)
    alone = []
    for step in range(2):
        loop.gradients(made, step)
        alone.append([gradient.clone() for gradient in made.flat.gradients])
    for both, forward, backward in zip(together, *alone, strict=True):
        mean = (forward + backward) / 2
        assert (both - mean).norm() <= 2e-3 * mean.norm() and mean.norm() > 0


def test_pictures_that_hardly_differ_have_no_mask(tmp_path):
    """Three levels in each channel: enough without a mask, nothing that a mask would leave."""
    from PIL import Image

    for name, level in (("a.png", 100), ("a_t.png", 103)):
        Image.new("RGB", (64, 64), (level,) * 3).save(tmp_path / name)
    files = tmp_path / "a.png", tmp_path / "a_t.png", ("", "")
    assert len(pairs.single_pair(*files).originals.pictures) == 1
    with pytest.raises(pairs.DataError, match=r"a.png and a_t.png \(no pixel differs clearly, so diff_use_diff_mask"):
        pairs.single_pair(*files, masked=True)
    case = pair_case.PairCase(tmp_path, tmp_path, tmp_path)
    given = {"original image": str(files[0]), "target image": str(files[1]), "lora_data_directory": str(tmp_path)}
    for mode in ("ADDifT", "Multi-ADDifT"):
        assert find_pair_data(case.job(mode=mode, **given))
        with pytest.raises(pairs.DataError, match="no pixel differs clearly"):
            find_pair_data(case.job(mode=mode, diff_use_diff_mask=True, **given))
    Image.new("RGB", (64, 64), (104,) * 3).save(tmp_path / "a_t.png")
    assert pairs.single_pair(*files, masked=True)


def test_ten_samples_meet_every_tenth_of_the_range(session):
    made = session(train_batch_size=5, train_min_timesteps=200, train_max_timesteps=400)
    seen = []
    hook = made.model.unet.register_forward_pre_hook(lambda _, given: seen.append(given[1].tolist()))
    for step in range(2):
        made.mode.loss(made.kit, made.source.batch(step))
    hook.remove()
    teacher, student = seen[::2], seen[1::2]
    assert teacher == student and [t[:5] for t in teacher] == [t[5:] for t in teacher]  # one for both directions
    assert sorted((t - 200) // 20 for one in teacher for t in one[:5]) == list(range(10))


def test_sdxl_is_told_the_sizes_of_a_pair_in_pixels(session):
    made = session("sdxl")
    assert made.source.batch(0).time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
