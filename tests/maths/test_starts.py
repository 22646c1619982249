"""Starts from the model's own weights and gradients, against whole decompositions, PEFT and autograd."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from trainer.maths import starts
from trainer.stages.start import factors, weight_gradients

SHAPES = [(24, 40), (40, 24), (32, 32)]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(shape: tuple[int, int], seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=stream(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_the_best_approximation_and_milora_the_worst_directions(shape: tuple[int, int]) -> None:
    weight, scale = matrix(shape), 0.75
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for init, part in (("pissa", slice(0, 6)), ("milora", slice(-6, None))):
        down, up = factors(init, weight, 6, scale, stream())
        torch.testing.assert_close(scale * up @ down, u[:, part] * s[part] @ v[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up.norm(dim=0).square().sort()[0] * scale, s[part].sort()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_takes_the_qr_factors(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    q, r = torch.linalg.qr(weight)
    down, up = factors("olora", weight, 6, 0.5, stream())
    torch.testing.assert_close(up @ down, q[:, :6] @ r[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.T @ up, torch.eye(6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_starts_the_same(init: str) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    weight = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    down, up = factors(init, weight, 4, 0.75, stream())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sign = torch.sign((down * a).sum(1))
    torch.testing.assert_close(down, a * sign[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up, b * sign, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, weight - 0.75 * up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_takes_other_directions_on_each_side(shape: tuple[int, int]) -> None:
    gradient = matrix(shape, 9)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    down, up = factors("lora_ga", gradient, 5, 1.0, stream())
    size = shape[0] ** 0.25 / 4
    for ours, theirs in ((down, v[:5]), (up.T, u[:, 5:10].T)):
        torch.testing.assert_close((ours @ theirs.T).abs(), size * torch.eye(5), rtol=1e-3, atol=1e-4)
    # Property of theorem 3.1: the first step of U moves along D, that of D along U, and both are parts of the gradient.
    step = gradient @ down.T @ down + up @ up.T @ gradient
    best = u[:, :10] @ u[:, :10].T @ gradient
    torch.testing.assert_close(step, best * size**2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "lora_ga"])
def test_a_rank_beyond_the_matrix_is_filled_up(init: str) -> None:
    for shape in ((6, 20), (20, 6)):
        down, up = factors(init, matrix(shape), 9, 1.0, stream())
        assert down.shape == (9, shape[1]) and up.shape == (shape[0], 9)
        assert torch.isfinite(down).all() and torch.isfinite(up).all()
        assert down.abs().sum(1).min() > 0, "no direction without a gradient"
        if init in ("pissa", "milora"):
            torch.testing.assert_close(up @ down, matrix(shape), rtol=1e-4, atol=1e-4)


def test_large_matrices_by_iteration() -> None:
    """A spectrum as weights have it: the iterated subspace equals the exact one; the draw decides nothing visible."""
    left = torch.linalg.qr(matrix((600, 400), 1)).Q
    right = torch.linalg.qr(matrix((500, 400), 2)).Q
    values = torch.arange(1, 401).float() ** -0.7
    weight = left * values @ right.T
    u, s, v = starts.top_singular(weight, 8, stream())
    torch.testing.assert_close(s, values[:8], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(u * s @ v, left[:, :8] * values[:8] @ right[:, :8].T, rtol=0, atol=1e-3)
    again = starts.top_singular(weight, 8, stream(3))[1]
    torch.testing.assert_close(again, s, rtol=1e-4, atol=1e-5)
    down, up = starts.smallest_directions(weight[:300, :260], 3, 1.0)
    tail = torch.linalg.svd(weight[:300, :260].double())
    best = (tail.U[:, 257:260] * tail.S[257:] @ tail.Vh[257:]).float()
    torch.testing.assert_close(up @ down, best, rtol=1e-2, atol=1e-5)


def test_the_gradients_of_frozen_weights_are_autograds() -> None:
    model = tiny.model("sd1")
    unet = model.unet
    modules = {name: m for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    x, t = torch.randn(2, 4, 8, 8, generator=stream()), torch.tensor([10, 500])
    context = torch.randn(2, 5, unet.config.cross_attention_dim, generator=stream(1))

    def loss() -> torch.Tensor:
        return unet(x, t, context).sample.square().mean((1, 2, 3))

    x.requires_grad_()
    context.requires_grad_()
    unet.time_embedding.linear_1.bias.requires_grad_()
    chosen = [m for name, m in modules.items() if ("attn" in name or "conv" in name) and "conv_in" not in name]
    ours = weight_gradients(chosen, loss)
    for module in chosen:
        module.weight.requires_grad_()
    theirs = torch.autograd.grad(loss().sum(), [m.weight for m in chosen])
    kinds = {type(m).__name__ for m in chosen}
    assert len(chosen) > 30 and {"Linear"} < kinds
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want.flatten(1), rtol=1e-3, atol=1e-6)
    assert not any(m._forward_hooks for m in chosen)
