"""Noise processes against closed forms: states, targets, what a prediction implies, weights and times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.maths import loss, rng
from trainer.maths.alphas import scaled_linear_alphas, zero_terminal_snr
from trainer.maths.process import Diffusion, Flow
from trainer.params.names import LOSS_WEIGHTINGS

EPSILON, V = Diffusion(scaled_linear_alphas()), Diffusion(scaled_linear_alphas(), "v_prediction")
ZERO = Diffusion(zero_terminal_snr(scaled_linear_alphas()), "v_prediction")
FLOW = Flow(3.0)
PROCESSES = {"epsilon": EPSILON, "v_prediction": V, "zero SNR": ZERO, "flow": FLOW}
named = pytest.mark.parametrize("name", PROCESSES)


def noised(process, count=4):
    stream = torch.Generator().manual_seed(3)
    z, noise = (torch.randn(count, 4, 8, 8, generator=stream, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(process.time(100), process.time(990), count).round(decimals=2)
    t = t.floor() if process.last > 1 else t
    return z, noise, t, process.add_noise(z, noise, t)


def mixture(process, t):
    """(α, σ) by their definition, in float64, (B, 1, 1, 1)."""
    if isinstance(process, Flow):
        return [part.double().view(-1, 1, 1, 1) for part in (1 - t, t)]
    alphas = process.alphas_cumprod_T.double()[t.long()].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def by_definition(process, z, noise, t):
    """What a perfect model predicts, from the definitions of ε, v and a velocity."""
    a, s = mixture(process, t)
    return {"epsilon": noise, "v_prediction": a * noise - s * z, "flow": noise - z}[process.prediction]


@named
def test_a_state_is_the_mixture_and_its_target_the_definition(name):
    process = PROCESSES[name]
    z, noise, t, x = noised(process)
    a, s = mixture(process, t)
    torch.testing.assert_close(x, a * z + s * noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.target(z, noise, t), by_definition(process, z, noise, t), rtol=1e-6, atol=1e-6)
    found = torch.tensor([process.half_log_snr(float(time)) for time in t], dtype=torch.float64)
    torch.testing.assert_close(found, (a / s).log().flatten(), rtol=1e-5, atol=1e-5)


@named
def test_a_perfect_prediction_gives_back_image_and_noise(name):
    process = PROCESSES[name]
    z, noise, t, x = noised(process)
    perfect = by_definition(process, z, noise, t)
    torch.testing.assert_close(process.x0(perfect, x, t), z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(process.noise(perfect, x, t), noise, rtol=1e-5, atol=1e-5)


@named
def test_a_prediction_follows_its_image_with_the_same_noise(name):
    """Clean latents moved by Δ: the state moves by α·Δ, and the implied noise stays, whatever was predicted."""
    process = PROCESSES[name]
    _, _, t, x = noised(process)
    predicted, move = (torch.randn(4, 4, 8, 8, dtype=torch.float64) for _ in range(2))
    a, _ = mixture(process, t)
    followed = process.follow(predicted, move, t)
    there = process.noise(followed, x + a * move, t)
    torch.testing.assert_close(there, process.noise(predicted, x, t), rtol=1e-5, atol=1e-5)
    if name == "flow":
        assert torch.equal(followed, predicted - move)


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.0])  # snr 9, 1, 0
    t = torch.arange(3.0)
    epsilon, v = Diffusion(alphas), Diffusion(alphas, "v_prediction")
    torch.testing.assert_close(epsilon.min_snr(5, t), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(v.min_snr(5, t), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(v.min_snr(5, t, always_epsilon=True), epsilon.min_snr(5, t))
    torch.testing.assert_close(v.min_snr(0, t), torch.ones(3))


def test_the_weights_of_noisy_samples_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.1, 0.0])  # snr 9, 1, 1/9, 0
    t = torch.arange(4.0)
    epsilon, v = Diffusion(alphas), Diffusion(alphas, "v_prediction")
    assert epsilon.weightings == v.weightings == LOSS_WEIGHTINGS  # what the form offers
    weights = {name: [process.loss_weight(name, t) for process in (epsilon, v)] for name in LOSS_WEIGHTINGS}
    torch.testing.assert_close(weights["none"], [torch.ones(4), torch.ones(4)])
    torch.testing.assert_close(weights["debiased"][0], torch.tensor([1 / 3, 1.0, 3.0, 20.0]))
    torch.testing.assert_close(weights["debiased"][1], torch.tensor([0.1, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(weights["velocity"], [torch.tensor([10 / 9, 2.0, 10.0, 20.0]), torch.ones(4)])
    for number, process in enumerate((epsilon, v)):
        flat = {name for name in LOSS_WEIGHTINGS if len(set(weights[name][number].tolist())) == 1}
        assert {name for name in LOSS_WEIGHTINGS if process.is_flat(name)} == flat


def test_a_weighting_that_a_process_does_not_have_is_refused_by_name():
    t = torch.tensor([0.2, 1.0])
    assert torch.equal(FLOW.loss_weight("none", t), torch.ones(2)) and torch.equal(FLOW.min_snr(0, t), torch.ones(2))
    for name in set(LOSS_WEIGHTINGS) - set(FLOW.weightings):
        with pytest.raises(ValueError, match=f"{name}.*flow"):
            FLOW.loss_weight(name, t)
    with pytest.raises(ValueError, match="min-SNR.*flow"):
        FLOW.min_snr(5, t)
    with pytest.raises(ValueError, match="sigmoid.*epsilon"):
        EPSILON.loss_weight("sigmoid", t)


def test_the_velocity_weight_makes_the_distance_of_noise_one_of_v():
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 700.0])
    one, other = torch.randn(2, 2, 4, 8, 8)
    a, s = EPSILON.signal(t, x)
    v = [a * noise - s * EPSILON.x0(noise, x, t) for noise in (one, other)]
    weighted = EPSILON.loss_weight("velocity", t) * loss.distance("MSE", one, other)
    torch.testing.assert_close(weighted, loss.distance("MSE", *v))


def test_times_of_a_diffusion_cover_the_range_and_stay_inside():
    t = EPSILON.draw_times(rng.uniform("t", 1, 0, range(4000)), 500, 510)
    assert t.dtype == torch.float32 and set(t.tolist()) == set(map(float, range(500, 510)))
    assert EPSILON.draw_times(torch.tensor([0.99]), 7, 7).item() == 7
    assert EPSILON.model_time(t).dtype == torch.int64 and torch.equal(EPSILON.timesteps(t), t)


def test_times_of_a_flow_are_the_shifted_distribution_cut_to_the_range():
    """P(time < x) of a uniform u through s·u/(1+(s−1)·u), under the condition that it lies in the range."""
    u = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    t = FLOW.draw_times(u, 200, 900)
    assert t.dtype == torch.float32 and t.min() >= 0.2 and t.max() < 0.9
    before = [x / (3 - 2 * x) for x in (0.2, 0.7, 0.9)]  # the uniform number that becomes x
    share = (before[1] - before[0]) / (before[2] - before[0])
    assert float((t < 0.7).double().mean()) == pytest.approx(share, abs=2e-4)
    torch.testing.assert_close(Flow().draw_times(u, 0, 1000), u.float())
    assert FLOW.draw_times(torch.tensor([0.99]), 300, 300).item() == pytest.approx(0.3)
    assert torch.equal(FLOW.model_time(t), t) and FLOW.time(250) == 0.25
    torch.testing.assert_close(FLOW.timesteps(t), 1000 * t)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15])
@pytest.mark.newest  # older versions cannot be given a list of sigmas
def test_the_shift_is_that_of_diffusers(shift):
    """What it trains at without a range, and what its pipelines sample at: even steps from 1, shifted."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs, flow = FlowMatchEulerDiscreteScheduler(shift=shift), Flow(shift)
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(flow.draw_times(u, 0, 1000), theirs.sigmas, rtol=1e-6, atol=1e-7)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    torch.testing.assert_close(torch.tensor(flow.sampling_times(8)), theirs.sigmas[:-1], rtol=1e-6, atol=1e-7)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist(), mu=shift)
    by_mu = torch.tensor(Flow(math.exp(shift)).sampling_times(8))
    torch.testing.assert_close(by_mu, dynamic.sigmas[:-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 7, 12, 20])
def test_the_steps_of_a_diffusion_are_the_trailing_ones_of_diffusers(count):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(count)
    assert list(EPSILON.sampling_times(count)) == theirs.timesteps.tolist()
    assert Diffusion(torch.tensor([0.9, 0.5])).sampling_times(20) == (1.0, 0.0)  # no time twice


@named
def test_spread_times_go_evenly_from_noise_to_the_middle_of_the_last_part(name):
    process = PROCESSES[name]
    times = np.array(process.spread_times(8))
    assert times[0] == process.last and len(times) == 8
    even = times / (3 - 2 * times) if name == "flow" else (times + 1) / 1000
    np.testing.assert_allclose(even, np.linspace(1, 1 / 16, 8), atol=1e-9 if name == "flow" else 2e-3)


def test_what_a_process_says_of_itself():
    assert EPSILON.description == "epsilon" and ZERO.description == "v_prediction, zero-terminal SNR"
    assert FLOW.description == "flow, shift 3" and FLOW.ending_in_noise() is FLOW and not FLOW.zero_snr
    assert len({process.key for process in (*PROCESSES.values(), Flow())}) == 5
    ended = EPSILON.ending_in_noise()
    assert ended.zero_snr and ended.ending_in_noise() is ended
    shown = [process.shows_image(process.last) for process in (EPSILON, ended, V, ZERO, FLOW)]
    assert shown == [True, False, True, True, True]
    assert ZERO.half_log_snr(999) == FLOW.half_log_snr(1.0) == -math.inf
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift"):
            Flow(wrong)
    with pytest.raises(ValueError, match="prediction"):
        Diffusion(scaled_linear_alphas(), "flow")
