"""Sampling against diffusers' samplers and against solutions in closed form."""

from __future__ import annotations

import pytest
import torch

from trainer.maths.alphas import scaled_linear_alphas, zero_terminal_snr
from trainer.maths.process import Diffusion, Flow
from trainer.maths.sampling import sampling

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def predicted(x, t):
    """Anything smooth that depends on the state and the time."""
    return torch.tanh(x) * 0.8 + 0.2 * torch.sin(x + t.view(-1, 1, 1, 1) / 100)


def end(process, times, order):
    *_, last = sampling(process, predicted, NOISE, times, order)
    return last.x


def by_diffusers(scheduler, count):
    scheduler.set_timesteps(count)
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(predicted(x, torch.full((2,), float(t))), t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [2, 12, 25])
def test_two_m_is_that_of_diffusers(prediction, count):
    from diffusers import DPMSolverMultistepScheduler

    kept = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    theirs = by_diffusers(DPMSolverMultistepScheduler(**kept, timestep_spacing="trailing"), count)
    process = Diffusion(scaled_linear_alphas(), prediction)
    torch.testing.assert_close(end(process, process.sampling_times(count), 2), theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_order_one_is_ddim_of_diffusers(prediction):
    from diffusers import DDIMScheduler

    kept = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    theirs = DDIMScheduler(**kept, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    process = Diffusion(scaled_linear_alphas(), prediction)
    found = end(process, process.sampling_times(20), 1)
    torch.testing.assert_close(found, by_diffusers(theirs, 20), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.newest  # older versions cannot be given a list of sigmas
def test_order_one_of_a_flow_is_eulers_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs, flow = FlowMatchEulerDiscreteScheduler(shift=shift), Flow(shift)
    theirs.set_timesteps(sigmas=[1 - part / 12 for part in range(12)])
    x = NOISE
    for t in theirs.timesteps:
        x = theirs.step(predicted(x, t.expand(2) / 1000), t, x).prev_sample
    torch.testing.assert_close(end(flow, flow.sampling_times(12), 1), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", [
    Diffusion(scaled_linear_alphas()), Diffusion(zero_terminal_snr(scaled_linear_alphas()), "v_prediction"), Flow(2.0),
], ids=["epsilon", "zero SNR, v", "flow"])  # fmt: skip
def test_the_path_of_a_normal_distribution_is_met_in_the_order_of_the_method(process):
    """Latents from N(m, d²) have a perfect prediction in closed form, and (x_t − α·m)/√(α²d² + σ²) stays on a path."""
    mean, deviation = 0.7, 0.5

    def place(x, t):
        a, s = process.signal(t, x)
        return (x - a * mean) / (a**2 * deviation**2 + s**2).sqrt()

    def perfect(x, t):
        a, s = process.signal(t, x)
        clean = mean + a * deviation**2 * (x - a * mean) / (a**2 * deviation**2 + s**2)  # E[z | x]
        return process.target(clean, (x - a * clean) / s, t)

    def error(count, order):
        times = [time for time in process.sampling_times(count) if time > process.time(400)]
        first, *_, last = sampling(process, perfect, NOISE.double(), times, order, until=process.time(400))
        return float((place(last.x, last.t) - place(first.x, first.t)).abs().mean())

    ratios = [error(40, order) / error(160, order) for order in (1, 2)]
    assert 3 < ratios[0] < 6 and 9 < ratios[1] < 25  # a quarter of the step: about 4 and 16
    assert error(40, 2) < error(40, 1) / 3


def test_the_states_on_the_way_end_where_they_are_asked_to():
    process = Diffusion(scaled_linear_alphas())
    times = process.spread_times(5)
    whole = list(sampling(process, predicted, NOISE, times, order=1))
    part = list(sampling(process, predicted, NOISE, times[:-1], order=1, until=times[-1]))
    assert [state.time for state in whole] == [*times, 0.0] and [state.time for state in part] == [*times]
    assert all(
        torch.equal(one.x, two.x) for one, two in zip(whole, part, strict=False)
    )  # no last step to clean latents
    assert [state.predicted is None for state in part] == [False] * 4 + [True]
    assert all(torch.equal(state.predicted, predicted(state.x, state.t)) for state in whole[:-1])
    assert torch.equal(whole[-1].x, process.x0(whole[-2].predicted, whole[-2].x, whole[-2].t))


def test_noise_of_pure_noise_leaves_the_state_as_it_is():
    """With ε and no signal nothing is said of the image: the next state is the same noise, and all stays finite."""
    process = Diffusion(zero_terminal_snr(scaled_linear_alphas()))
    found = list(sampling(process, predicted, NOISE, process.sampling_times(4)))
    assert torch.equal(found[1].x, NOISE) and not torch.equal(found[2].x, NOISE)
    assert all(bool(state.x.isfinite().all()) for state in found)
