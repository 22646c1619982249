"""Closed forms for schedules, targets, weights and keyed random numbers."""

from __future__ import annotations

import pytest
import torch

from trainer.maths import loss, projection, rng
from trainer.maths.schedule import NoiseSchedule, scaled_linear_alphas, zero_terminal_snr
from trainer.params.names import LOSS_WEIGHTINGS, LOSSES


def test_alphas_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(scaled_linear_alphas(), theirs, rtol=1e-5, atol=1e-7)


def test_zero_terminal_snr_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    ours = zero_terminal_snr(scaled_linear_alphas())
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-4, atol=1e-6)
    assert ours[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_perfect_predictor_has_no_loss_and_gives_back_the_picture(prediction):
    schedule = NoiseSchedule(scaled_linear_alphas(), prediction)
    z, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 300, 700, 999])
    x, perfect = schedule.add_noise(z, noise, t), schedule.target(z, noise, t)
    assert loss.distance("MSE", perfect, schedule.target(z, noise, t)).sum() == 0
    torch.testing.assert_close(schedule.x0(perfect, x, t), z, rtol=1e-3, atol=1e-3)


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.0])  # snr 9, 1, 0
    t = torch.tensor([0, 1, 2])
    epsilon, v = NoiseSchedule(alphas), NoiseSchedule(alphas, "v_prediction")
    torch.testing.assert_close(loss.min_snr_weight(epsilon, t, 5), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(loss.min_snr_weight(v, t, 5), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(loss.min_snr_weight(v, t, 0), torch.ones(3))


def test_the_weights_of_noisy_samples_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.1, 0.0])  # snr 9, 1, 1/9, 0
    t = torch.arange(4)
    epsilon, v = NoiseSchedule(alphas), NoiseSchedule(alphas, "v_prediction")
    assert tuple(loss.WEIGHTS) == LOSS_WEIGHTINGS and tuple(loss.DISTANCES) == LOSSES  # what the table offers
    weights = {name: [weight(schedule, t) for schedule in (epsilon, v)] for name, weight in loss.WEIGHTS.items()}
    torch.testing.assert_close(weights["none"], [torch.ones(4), torch.ones(4)])
    torch.testing.assert_close(weights["debiased"][0], torch.tensor([1 / 3, 1.0, 3.0, 20.0]))
    torch.testing.assert_close(weights["debiased"][1], torch.tensor([0.1, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(weights["velocity"], [torch.tensor([10 / 9, 2.0, 10.0, 20.0]), torch.ones(4)])


def test_the_velocity_weight_makes_the_distance_of_noise_one_of_v():
    schedule = NoiseSchedule(scaled_linear_alphas())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    one, other = torch.randn(2, 2, 4, 8, 8)
    a, s = schedule.signal(t, x)
    v = [a * noise - s * schedule.x0(noise, x, t) for noise in (one, other)]
    expected = loss.distance("MSE", *v)
    torch.testing.assert_close(loss.velocity_weight(schedule, t) * loss.distance("MSE", one, other), expected)


def test_a_mask_weights_but_keeps_the_scale():
    predicted, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    mask = torch.rand(2, 1, 4, 4) + 0.1
    torch.testing.assert_close(loss.distance("MSE", predicted, target, mask), torch.ones(2))


@pytest.mark.parametrize("name", ["MSE", "L1", "Smooth-L1"])
def test_distances_by_hand(name):
    predicted, target = torch.tensor([[[[2.0, 0.5]]]]), torch.zeros(1, 1, 1, 2)
    by_hand = {"MSE": (4 + 0.25) / 2, "L1": 1.25, "Smooth-L1": (1.5 + 0.125) / 2}
    assert loss.distance(name, predicted, target).item() == pytest.approx(by_hand[name])


def test_a_change_along_a_difference_by_hand():
    """All of a change that points along the difference stays, nothing across it, nothing where they are alike."""
    difference = torch.zeros(2, 4, 3, 3)
    difference[0, 1, 0, 0], difference[0, 2, 0, 0] = 3.0, 4.0  # |d|² = 25 in one place
    ridge = projection.RIDGE * 25
    change = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    change[0, :, 0, 0] = torch.tensor([7.0, 6.0, 8.0, -7.0])  # twice the difference, and something across it
    found = projection.along(change, difference)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.0, 6.0, 8.0, 0.0]) * 25 / (25 + ridge))
    found[0, :, 0, 0] = 0
    assert not found.any()  # of the second sample, whose difference is zero everywhere, nothing at all


def test_what_is_noise_in_a_difference_takes_no_part_however_small_the_place_that_differs():
    """One place of 1, 4 and 400 differs by 5, the others by a fiftieth of it in each channel."""
    for edge in (1, 2, 20):
        stream = torch.Generator().manual_seed(2)
        change, noise = torch.randn(2, 4, edge, edge, generator=stream), torch.randn(1, 4, edge, edge, generator=stream)
        difference = 0.1 * noise
        difference[0, :, 0, 0] = torch.tensor([0.0, 3.0, 4.0, 0.0])
        found = projection.along(change[:1], difference)
        inside, outside = (float(part.square().sum()) for part in (found[..., 0, 0], found[..., 1:, :]))
        assert inside > 0 and outside <= 0.02 * float(change[:1, :, 1:].square().sum())


def test_timesteps_cover_the_range_and_stay_inside():
    t = loss.uniform_timesteps(rng.uniform("t", 1, 0, range(4000)), 500, 510)
    assert t.min() == 500 and t.max() == 509
    assert loss.uniform_timesteps(torch.tensor([0.99]), 7, 7).item() == 7


def test_draws_do_not_depend_on_who_draws_them():
    both = rng.normal((2, 3), "noise", 5, 9, [0, 1, 2, 3])
    torch.testing.assert_close(both[2:], rng.normal((2, 3), "noise", 5, 9, [2, 3]), rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, rng.normal((2, 3), "noise", 5, 10, [0, 1, 2, 3]))
