"""The part of a change that points along a difference."""

from __future__ import annotations

import torch

from trainer.maths import projection


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
