"""Keyed random numbers."""

from __future__ import annotations

import torch

from trainer.maths import rng


def test_draws_do_not_depend_on_who_draws_them():
    both = rng.normal((2, 3), "noise", 5, 9, [0, 1, 2, 3])
    torch.testing.assert_close(both[2:], rng.normal((2, 3), "noise", 5, 9, [2, 3]), rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, rng.normal((2, 3), "noise", 5, 10, [0, 1, 2, 3]))
