"""ABM: the loss by hand, the small random start, the layers it looks at."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapter_layers import layers, network
from torch import nn

from trainer.adapters.base import AdapterSpec
from trainer.models.base import Model
from trainer.stages.abm import NUDGE, boundary_loss, listening, nudge


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_loss_by_hand(power) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.randn(2, 5, 3, generator=generator) for _ in range(2)]
    got = [one + 0.3 * torch.randn(one.shape, generator=generator) for one in wanted]
    by_hand = 0.0
    for place in range(2):
        star, z = wanted[place].reshape(10, 3).numpy(), got[place].reshape(10, 3).numpy()
        terms = []
        for channel in range(3):
            far = 0.5 * star[:, channel].std(ddof=1)
            terms += [max(0.0, far - np.sign(a) * b) ** 2 for a, b in zip(star[:, channel], z[:, channel], strict=True)]
        by_hand += ((place + 1) / 2) ** power * np.mean(terms) / 2
    assert float(boundary_loss(wanted, got, 0.5, power)) == pytest.approx(by_hand, rel=1e-5)
    far = [10 * torch.sign(one) for one in wanted]
    assert float(boundary_loss(wanted, far, 0.5, power)) == 0.0


@pytest.mark.parametrize("kind", ["lierla", "null", "universal", "loha", "full"])
def test_the_random_start_is_small_and_random(kind) -> None:
    net = network(layers(), AdapterSpec(kind, rank=4, alpha=2.0))
    for adapter in net:
        kept = {name: p.clone() for name, p in adapter.named_parameters() if p.any()}
        nudge(adapter, torch.Generator().manual_seed(1))
        ratio = adapter.delta().norm() / adapter.module.weight.norm()
        torch.testing.assert_close(ratio.detach(), torch.tensor(NUDGE), rtol=1e-3, atol=0)
        assert all(torch.equal(adapter.get_parameter(name), p) for name, p in kept.items())


class GEGLU(nn.Module):
    """As in diffusers: the first half of the projection, times gelu of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x):
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * nn.functional.gelu(gate)


def test_only_the_gate_half_of_gated_projections_is_heard() -> None:
    model = nn.Sequential(nn.Linear(4, 4), GEGLU(), nn.Linear(3, 4), GEGLU())
    gates, x = Model.gates.fget(SimpleNamespace(unet=model)), torch.randn(2, 5, 4)
    assert gates == [model[1].proj, model[3].proj]
    with listening(gates) as heard:
        model(x)
    torch.testing.assert_close(heard[0], model[1].proj(model[0](x))[..., 3:])
    assert len(heard) == 2 and not gates[0]._forward_hooks
