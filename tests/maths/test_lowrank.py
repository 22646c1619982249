"""The low-rank layer as one operation: gradients by finite differences, both ways to the result, precisions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from trainer.maths import lowrank
from trainer.maths.lowrank import (
    LowRankConv,
    LowRankLinear,
    kaiming_down,
    low_rank_conv,
    low_rank_delta,
    low_rank_linear,
)

PER_SAMPLE = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
PER_RANK = torch.tensor([[1.0, 0.0], [-0.5, 0.5], [0.25, 2.0]], dtype=torch.float64)
GEOMETRIES = [(1, 0, 1), ((2, 2), (1, 1), (1, 1)), (1, 2, 2)]


def doubles(*shapes: tuple[int, ...], grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def _linear(layer, weight, bias, scale, x, down, up):
    return layer(x, weight, bias, down, up, scale)


def _conv(layer, weight, bias, scale, geometry, x, down, up):
    return layer(x, weight, bias, down, up, scale, geometry)


@pytest.mark.parametrize("scale", [0.7, PER_SAMPLE, PER_RANK], ids=["number", "per sample", "per rank"])
@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 5)], ids=["tokens", "rows"])
@pytest.mark.parametrize("grad_x", [True, False], ids=["x needs it", "x does not"])
def test_linear_gradients_by_finite_differences(scale, shape, grad_x: bool) -> None:
    (x,) = doubles(shape, grad=grad_x)
    down, up = doubles((2, 5), (4, 2))
    weight, bias = doubles((4, 5), (4,), grad=False)
    for layer, offset in ((LowRankLinear.apply, bias), (low_rank_linear, None)):
        assert torch.autograd.gradcheck(partial(_linear, layer, weight, offset, scale), (x, down, up))


@pytest.mark.parametrize("scale", [0.7, PER_SAMPLE, PER_RANK], ids=["number", "per sample", "per rank"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("grad_x", [True, False], ids=["x needs it", "x does not"])
def test_convolution_gradients_by_finite_differences(scale, geometry, grad_x: bool) -> None:
    kernel = 1 if geometry[1] == 0 else 3
    (x,) = doubles((3, 2, 4, 3), grad=grad_x)
    down, up = doubles((2, 2, kernel, kernel), (3, 2))
    weight, bias = doubles((3, 2, kernel, kernel), (3,), grad=False)
    for layer, offset in ((LowRankConv.apply, bias), (low_rank_conv, bias), (low_rank_conv, None)):
        assert torch.autograd.gradcheck(partial(_conv, layer, weight, offset, scale, geometry), (x, down, up))
    if kernel == 1:
        points = partial(_linear, lowrank.LowRankPointwise.apply, weight, bias, scale)
        assert torch.autograd.gradcheck(points, (x, down, up))


def test_a_scale_per_rank_is_a_diagonal_matrix_in_the_middle() -> None:
    x, down, up, weight = doubles((3, 4, 5), (2, 5), (4, 2), (4, 5), grad=False)
    got = LowRankLinear.apply(x, weight, None, down, up, PER_RANK)
    want = [row @ (weight + up @ torch.diag(scale) @ down).T for row, scale in zip(x, PER_RANK, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("frozen", ["down", "up", "both"])
def test_frozen_factors_get_no_gradient(frozen: str) -> None:
    x, down, up = doubles((3, 2, 5), (2, 5), (4, 2))
    (weight,) = doubles((4, 5), grad=False)
    down.requires_grad_(frozen == "up")
    up.requires_grad_(frozen == "down")
    LowRankLinear.apply(x, weight, None, down, up, 1.0).sum().backward()
    assert x.grad is not None
    assert (down.grad is not None, up.grad is not None) == (frozen == "up", frozen == "down")


@pytest.mark.parametrize("pays", [True, False])
def test_both_ways_give_the_same(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(lowrank, "merging_pays", lambda *_: pays)
    x, down, up = doubles((3, 2, 5), (2, 5), (4, 2))
    weight, bias = doubles((4, 5), (4,), grad=False)
    y = low_rank_linear(x, weight, bias, down, up, -0.5)
    torch.testing.assert_close(y, x @ (weight - 0.5 * up @ down).T + bias)
    picture, kernel = doubles((2, 5, 4, 4), (2, 5, 3, 3))
    (wide,) = doubles((4, 5, 3, 3), grad=False)
    y = low_rank_conv(picture, wide, bias, kernel, up, -0.5, (1, 1, 1))
    whole = wide - 0.5 * (up @ kernel.flatten(1)).view(wide.shape)
    torch.testing.assert_close(y, nn.functional.conv2d(picture, whole, bias, padding=1))
    points, narrow = kernel[:, :, :1, :1], wide[:, :, :1, :1]
    y = low_rank_conv(picture, narrow, bias, points, up, -0.5, (1, 0, 1))
    whole = narrow - 0.5 * (up @ points.flatten(1)).view(narrow.shape)
    torch.testing.assert_close(y, nn.functional.conv2d(picture, whole, bias))


def test_merging_is_chosen_by_cost() -> None:
    assert lowrank.merging_pays(rows=512, fan_in=64, fan_out=64, rank=16)
    assert not lowrank.merging_pays(rows=8, fan_in=64, fan_out=64, rank=16)
    assert not lowrank.merging_pays(rows=4096, fan_in=320, fan_out=320, rank=16)
    assert lowrank.merging_pays(rows=4096, fan_in=320, fan_out=320, rank=128)


def test_start_is_kaiming_uniform_with_a_root_five() -> None:
    ours = kaiming_down((64, 24, 3, 3), torch.Generator().manual_seed(0))
    reference = torch.empty(64, 24, 3, 3)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)


def test_delta_is_scale_times_up_times_down() -> None:
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert low_rank_delta(down, up, 0.5).tolist() == [[1.5, 3.0], [2.0, 4.0]]


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.5, -1.0, 2.0])], ids=["number", "per sample"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_half_precision_compute_with_float32_factors(scale, weight_dtype: torch.dtype) -> None:
    """bf16 input as on a GPU: gradients come back in the factors' float32, close to the float32 arithmetic."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 6, 32, generator=generator), torch.randn(24, 32, generator=generator) / 6
    factors = [torch.randn(8, 32, generator=generator) / 6, torch.randn(24, 8, generator=generator) / 6]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        down, up = (factor.clone().requires_grad_() for factor in factors)
        rows = x.to(dtype).requires_grad_()
        y = low_rank_linear(rows, weight.to(weight_dtype), None, down, up, scale)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert down.grad.dtype == up.grad.dtype == torch.float32 and rows.grad.dtype == dtype
        results.append([y.float(), rows.grad.float(), down.grad, up.grad])
    for half, full in zip(*results, strict=True):
        assert (half - full).norm() / full.norm() < 0.02


def test_a_wrong_number_of_strengths_is_refused() -> None:
    x, down, up = doubles((3, 5), (2, 5), (4, 2))
    with pytest.raises(ValueError, match="2 values for a batch of 3"):
        low_rank_linear(x, torch.randn(4, 5, dtype=torch.float64), None, down, up, torch.ones(2))


def test_channels_last_pictures() -> None:
    x, down, up = doubles((2, 5, 4, 4), (2, 5, 3, 3), (4, 2))
    (weight,) = doubles((4, 5, 3, 3), grad=False)
    y = LowRankConv.apply(x.to(memory_format=torch.channels_last), weight, None, down, up, 2.0, (1, 1, 1))
    whole = weight + 2.0 * (up @ down.flatten(1)).view(weight.shape)
    wanted = nn.functional.conv2d(x, whole, padding=1)
    torch.testing.assert_close(y, wanted)
    ours, reference = (torch.autograd.grad(value.square().sum(), [x, down, up]) for value in (y, wanted))
    for got, want in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, want)
