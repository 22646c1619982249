"""Distances by hand."""

from __future__ import annotations

import pytest
import torch

from trainer.maths import loss
from trainer.params.names import LOSSES


def test_distances_are_those_that_the_form_offers():
    assert tuple(loss.DISTANCES) == LOSSES


def test_a_mask_weights_but_keeps_the_scale():
    predicted, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    mask = torch.rand(2, 1, 4, 4) + 0.1
    torch.testing.assert_close(loss.distance("MSE", predicted, target, mask), torch.ones(2))


@pytest.mark.parametrize("name", ["MSE", "L1", "Smooth-L1"])
def test_distances_by_hand(name):
    predicted, target = torch.tensor([[[[2.0, 0.5]]]]), torch.zeros(1, 1, 1, 2)
    by_hand = {"MSE": (4 + 0.25) / 2, "L1": 1.25, "Smooth-L1": (1.5 + 0.125) / 2}
    assert loss.distance(name, predicted, target).item() == pytest.approx(by_hand[name])
