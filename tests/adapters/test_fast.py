"""The ways around a dense ΔW give what the dense ΔW gives."""

from __future__ import annotations

import dataclasses
import math

import adapter_layers
import pytest
import torch
from adapter_layers import layers, network, shake
from adapter_specs import SPECS

from trainer.adapters.dora import Decomposed
from trainer.contracts import Role
from trainer.engine.memory import step_bytes
from trainer.maths.hadamard import thin_pays
from trainer.maths.kron import kron_inner

LENGTHS = ("lierla", "c3lier", "loha", "lokr")
DECOMPOSED = sorted(name for name in SPECS if "dora" in name and SPECS[name].type in LENGTHS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)], ids=["linear", "1x1", "3x3"])
@pytest.mark.parametrize("on_input", [True, False], ids=["input", "output"])
def test_a_weight_times_a_kronecker_product_needs_no_dense_one(kernel: tuple[int, ...], on_input: bool) -> None:
    w1, w2, weight = drawn(3, 4), drawn(5, 6, *kernel), drawn(15, 24, *kernel)
    rows = [torch.cat([number * w2 for number in row], 1) for row in w1]
    over = [axis for axis in range(weight.ndim) if axis != (1 if on_input else 0)]
    wanted = (weight * torch.cat(rows, 0)).sum(over)
    torch.testing.assert_close(kron_inner(weight, w1, w2, on_input), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_lengths_that_dora_divides_by_are_those_of_the_sum(name: str) -> None:
    """‖W + V‖ of every input or output, from the dense V in double precision."""
    net = network(layers(), SPECS[name])
    shake(net, size=0.6)
    for adapter in net:
        adapter.magnitude.data.zero_()
        weight, plain = adapter.module.weight.double(), super(Decomposed, adapter).delta().double()
        over = [axis for axis in range(weight.ndim) if axis != (1 if adapter.on_input else 0)]
        bare, whole = weight.square().sum(over).sqrt(), (weight + plain).square().sum(over).sqrt()
        assert (whole / bare - 1).abs().max() > 0.01
        torch.testing.assert_close(adapter.gain().double(), bare / whole, rtol=1e-5, atol=1e-6)


CONVOLVED = sorted(name for name in SPECS if SPECS[name].type in ("c3lier", "loha", "lokr", "oft", "boft", "full"))


@pytest.mark.parametrize("name", CONVOLVED)
def test_a_convolution_wide_enough_for_every_split(name: str) -> None:
    """The gradient that goes on to the layer before is the dense one's, and a step can be estimated without data.

    Layers of the contract are so narrow that low-rank parts of rank 1 hide in which order a kernel lies in memory.
    """
    own = adapter_layers.record(
        "lora_unet_down_blocks_0_resnets_0_conv1", torch.nn.Conv2d(32, 24, 3, padding=1), "unet", "IN01", "conv3x3",
        Role.CONV,
    )  # fmt: skip
    own.module.requires_grad_(False)
    net = network([own], dataclasses.replace(SPECS[name], rank=6 if name == "boft" else 2, conv_rank=0))
    shake(net)
    (adapter,) = net
    x, by = drawn(2, 32, 5, 6).requires_grad_(), drawn(2, 24, 5, 6)

    def loss() -> torch.Tensor:
        return (own.module(x * 1) * by).sum()

    with net.attached():
        (found,) = torch.autograd.grad(loss(), x)
        assert step_bytes([net, own.module], loss) > 0
    weight = own.module.weight + adapter.delta()
    (wanted,) = torch.autograd.grad((torch.nn.functional.conv2d(x, weight, padding=1) * by).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_loha_chooses_the_way_by_its_cost() -> None:
    """Through r² where a layer is wide and sees few rows: 1280 wide at 16x16 latents, not 320 wide at 64x64."""
    assert thin_pays(16, 1280, 1280, 16) and thin_pays(256, 1280, 1280, 16) and thin_pays(16, 9 * 1280, 1280, 16)
    assert not thin_pays(4096, 320, 320, 16) and not thin_pays(256, 320, 320, 16) and not thin_pays(64, 1280, 1280, 64)


@pytest.mark.parametrize("kind", ["full", "loha"])
def test_a_change_below_the_last_digit_of_a_half_precision_weight_acts(kind: str) -> None:
    """ΔW = 3·10⁻⁵ everywhere beside weights of 0.05, whose next bfloat16 neighbours are 2·10⁻⁴ away."""
    layer = torch.nn.Linear(2048, 8, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer.weight[:, ::2], layer.weight[:, 1::2] = 0.05, -0.05
    record = adapter_layers.record("lora_unet_x", layer, "unet", "M00", "linear", Role.SELF_Q)
    (adapter,) = net = network([record], dataclasses.replace(SPECS[kind], rank=4, alpha=4.0))
    with torch.no_grad():
        if kind == "full":
            adapter.diff.fill_(3e-5)
        else:
            for name, value in (("w1_a", 0.25), ("w1_b", 1.0), ("w2_a", 0.25), ("w2_b", 3e-5)):
                adapter.get_parameter(f"hada_{name}").fill_(value)
    torch.testing.assert_close(adapter.delta(), torch.full((8, 2048), 3e-5))
    x = torch.ones(400, 2048, dtype=torch.bfloat16)
    assert layer(x).abs().max() == 0
    with net.attached():
        y = adapter.module(x.requires_grad_())
    torch.testing.assert_close(y.float(), torch.full((400, 8), 2048 * 3e-5), rtol=0.01, atol=0)
    y.sum().backward()
    trained = next(p for p in adapter.parameters() if p.grad is not None)
    assert torch.isfinite(trained.grad).all() and x.grad.shape == x.shape
