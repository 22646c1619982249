"""LaLoRA: the curvature against autograd, the penalty against its definition, files that are refused."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from adapter_layers import layers, network, shake
from torch import nn

from trainer.adapters.base import AdapterSpec
from trainer.adapters.file import write_lora
from trainer.errors import AdapterError
from trainer.maths.fisher import Curvature, probe, weighted_square
from trainer.stages.lalora import COLUMNS, MARK, ROWS, VERSION, Lalora, LaloraParams, read_context


def small() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(2), nn.Linear(4, 2))
    return model.requires_grad_(False), torch.randn(2, 2, 4, 4)


def test_squared_gradients_of_single_samples_against_autograd() -> None:
    model, x = small()
    named = {"conv": model[0], "linear": model[3]}
    curvature = Curvature(named)
    targets = torch.randn(2, 3, 2)
    with curvature.listening(scale=8.0):
        (model(x) - targets).square().sum().mul(8.0).backward()
    curvature.samples = 2
    for key, layer in named.items():
        squares = torch.zeros_like(layer.weight)
        for row in range(2):
            layer.weight.requires_grad_(True)
            loss = (model(x[row : row + 1]) - targets[row : row + 1]).square().sum()
            squares += torch.autograd.grad(loss, layer.weight)[0].square() / 2
            layer.weight.requires_grad_(False)
        rows, columns = curvature.factors()[key]
        torch.testing.assert_close(rows, squares.flatten(1).sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rows.sum() * columns, squares.flatten(1).sum(0), rtol=1e-4, atol=1e-6)
    assert all(not module._forward_hooks for module in model.modules())


def test_half_the_weighted_sum_is_the_mean_square_change_of_the_prediction() -> None:
    """Exact where the mixed terms vanish: one changed weight of a linear layer, all 2ⁿ signs in turn."""
    torch.manual_seed(1)
    layer, x = nn.Linear(4, 3, bias=False).requires_grad_(False), torch.randn(1, 4)
    curvature = Curvature({"a": layer})
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        with curvature.listening():
            predicted = layer(x)
            predicted.backward(probe(predicted.detach(), torch.tensor([signs]), torch.Generator()))
        curvature.samples += 1
    rows, columns = curvature.factors()["a"]
    change = torch.zeros(3, 4)
    change[1, 2] = 0.7
    torch.testing.assert_close(
        0.5 * (rows[:, None] * columns * change.square()).sum(), (x @ change.T).square().mean(), rtol=1e-4, atol=1e-6
    )
    residual = probe(torch.zeros(5), torch.tensor([3.0, -4.0, 0.0, 0.0, 0.0]), torch.Generator())
    torch.testing.assert_close(residual.square().mean(), torch.tensor(2 / 5))


def test_the_weighted_square_needs_no_product() -> None:
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(3, 2, 7, generator=generator), torch.randn(3, 5, 2, generator=generator)
    columns, rows = torch.rand(3, 7, generator=generator), torch.rand(3, 5, generator=generator)
    dense = (rows[:, :, None] * columns[:, None] * (up @ down).square()).sum(dim=(1, 2))
    torch.testing.assert_close(weighted_square(down, up, columns, rows), dense)


def stage(strength, path="", **own):
    settings = {LaloraParams: LaloraParams(lalora_lambda=strength, lalora_context_path=str(path), **own)}
    return Lalora(settings)


@pytest.mark.parametrize("kind", ["lierla", "c3lier", "null", "universal", "experts", "full", "loha"])
def test_the_penalty_is_its_definition_for_every_kind_of_adapter(kind, tmp_path) -> None:
    net = network(layers(), AdapterSpec(kind, rank=4, alpha=6.0, conv_rank=2, conv_alpha=1.0))
    shake(net)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for adapter in net:
        fan_out, fan_in = adapter.module.weight.flatten(1).shape
        tensors[f"{adapter.key}.{ROWS}"] = torch.rand(fan_out, generator=generator)
        tensors[f"{adapter.key}.{COLUMNS}"] = torch.rand(fan_in, generator=generator)
    path = write_lora(tmp_path / "context.safetensors", tensors, {MARK: VERSION})
    told: list[str] = []
    one = stage(3.0, path)
    one.prepare(SimpleNamespace(network=net, tell=told.append))
    penalty = one.penalty(net)
    dense = 1.5 * sum(
        (tensors[f"{a.key}.{ROWS}"][:, None] * tensors[f"{a.key}.{COLUMNS}"] * a.delta().flatten(1).square()).sum()
        for a in net
    )
    assert float(penalty.detach()) > 0 and f"{len(net)} of {len(net)} layers" in told[0]
    torch.testing.assert_close(penalty, dense, rtol=1e-4, atol=1e-5)
    trained = [p for p in net.parameters() if p.requires_grad]
    ours = torch.autograd.grad(penalty, trained, allow_unused=True)
    for got, want in zip(ours, torch.autograd.grad(dense, trained, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_other_files_are_refused_with_a_reason(tmp_path) -> None:
    net = network(layers(), AdapterSpec("lierla", rank=2))
    fork = {"unet_down_blocks_0.alpha_mean": torch.zeros(16), "unet_down_blocks_0.alpha_precision": torch.ones(16)}
    cases = (
        ("fork", fork, {}, "context of sd-scripts' fork.*which no adapter here has.*curvature tool"),
        ("lora", {"a.lora_up.weight": torch.ones(1)}, {}, "not a file of curvature"),
        (
            "other",
            {f"lora_unet_x.{ROWS}": torch.ones(2), f"lora_unet_x.{COLUMNS}": torch.ones(2)},
            {MARK: VERSION},
            "another kind of base model",
        ),
    )
    for name, tensors, metadata, message in cases:
        path = write_lora(tmp_path / f"{name}.safetensors", tensors, metadata)
        with pytest.raises(AdapterError, match=message):
            read_context(path, net)
