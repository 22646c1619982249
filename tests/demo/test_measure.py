"""The measurements against closed forms, on a model whose predictions are known."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from trainer.demo import effect, measure, world
from trainer.models.base import Conditioning

# ε_0 of a prompt is a constant; the adapter moves "red" a share of the way to "blue" and leaks a little into "green".
BASE = {"red": 1.0, "blue": 3.0, "green": 0.0, "": -1.0}


class Network:
    strength = 1.0

    @contextmanager
    def at_strength(self, value):
        before, self.strength = self.strength, value
        try:
            yield
        finally:
            self.strength = before


class Model:
    def __init__(self, network, learned=0.75, leak=0.5):
        self.network, self.learned, self.leak = network, learned, leak

    def encode_prompts(self, prompts, clip_skip=1):
        return Conditioning(
            torch.tensor([[[BASE[prompt], float(prompt == "red"), float(prompt == "green")]] for prompt in prompts])
        )

    def time_ids(self, *sizes):
        return None

    def predict(self, x, t, cond, ids):
        value, is_red, is_green = cond.context_BLD[:, 0].unbind(-1)
        value = value + self.network.strength * (is_red * self.learned * 2.0 + is_green * self.leak)
        return value.view(-1, 1, 1, 1).expand_as(x)


@pytest.fixture
def probe():
    network = Network()
    states = [measure.State(torch.randn(2, 4, 8, 8), t) for t in (500, 900)]
    return measure.Probe(Model(network), network, states)


def test_map_ratio_by_hand(probe):
    # ‖(1 + 1.5) − 3‖² = 0.25 of ‖1 − 3‖² = 4
    assert probe.map_ratio("red", "blue") == pytest.approx(1 - 0.25 / 4)
    assert probe.map_ratio("red", "blue", strength=0.0) == pytest.approx(0.0)
    assert probe.map_ratio("red", "blue", strength=-1.0) < 0


def test_leaks_by_hand(probe):
    leaks = probe.leaks("red", "blue", ["green", ""])
    assert leaks == {"green": pytest.approx(0.25 / 4), "": pytest.approx(0.0)}


def test_memorisation_is_the_difference_of_two_map_ratios(probe):
    assert measure.memorisation(probe, probe, "red", "blue") == 0


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81 of 263 → 0.2553 to 0.3662; 0 of 20 → 0 to 0.1611
    low, high = measure.Rate(81, 263).interval
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    low, high = measure.Rate(0, 20).interval
    assert (low, high) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.1611, abs=1e-4))
    assert measure.Rate(0, 0).interval == (0.0, 1.0)


def test_pair_effect_by_hand():
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1
    wanted = torch.ones(1, 3, 2, 2)
    right = measure.pair_effect(wanted * mask, wanted, mask)
    assert right.cosine == pytest.approx(1.0) and right.outside == pytest.approx(0.0)
    opposite = measure.pair_effect(-wanted, wanted, mask)
    assert opposite.cosine == pytest.approx(-1.0) and opposite.outside == pytest.approx(0.5)


def test_first_reached_needs_both():
    trace = [(10, 0.9, 0.5), (20, 0.7, 0.05), (30, 0.85, 0.1), (40, 0.9, 0.0)]
    assert measure.first_reached(trace) == 30
    assert measure.first_reached(trace[:2]) is None


def test_agreement_counts_an_unreadable_attribute_as_a_miss():
    scene = world.Scene("circle", "red", "white", "small", "left")
    reading = SimpleNamespace(shape="circle", colour=None, background="white", size="small", side="right")
    rates = measure.agreement([scene, scene], [reading, reading])
    assert {name: rate.value for name, rate in rates.items()} == {
        "shape": 1.0,
        "colour": 0.0,
        "background": 1.0,
        "size": 1.0,
        "side": 0.0,
    }


def test_concept_scenes_hold_the_new_shape_and_unrelated_ones_never():
    assert {scene.shape for scene in effect.concept_scenes(50)} == {world.HELD_OUT_SHAPE}
    assert world.HELD_OUT_SHAPE not in {scene.shape for scene in effect.unrelated_scenes(200)}


def test_the_grid_has_a_place_for_every_picture():
    pictures = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    sheet = effect.grid(pictures, ["first", "second"], ["a", "b", "c"], scale=1)
    left, top = 12 + max(7 * len("second"), 40), 26
    assert sheet.size == (left + 3 * 70, top + 2 * 70)
    corner = torch.tensor(sheet.getpixel((left + 70, top + 70)), dtype=torch.float32)
    assert torch.allclose(corner, (pictures[1, 1, :, 0, 0] + 1) * 127.5, atol=1.0)
