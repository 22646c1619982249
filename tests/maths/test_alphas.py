"""Tables of ᾱ against diffusers'."""

from __future__ import annotations

import torch

from trainer.maths.alphas import scaled_linear_alphas, zero_terminal_snr


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
