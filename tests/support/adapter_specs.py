"""What adapter tests are run over: a specification of every type in the registry and of its variants; trained ones."""

from __future__ import annotations

import dataclasses

import torch
from adapter_layers import input_of, layers, network

from trainer.adapters.base import ADAPTERS, AdapterSpec
from trainer.adapters.dora import DoraOptions
from trainer.adapters.eh import EhOptions
from trainer.adapters.lokr import LokrOptions
from trainer.adapters.network import Network
from trainer.adapters.tucker import TuckerOptions

SPECS = {name: AdapterSpec(name, rank=4, alpha=3.0, conv_rank=2, conv_alpha=5.0) for name in ADAPTERS.names()}
SPECS |= {
    f"{name} {label}": dataclasses.replace(SPECS[name], options={type(option): option for option in options})
    for name, label, *options in (
        ("lierla", "dora", DoraOptions(use_dora=True)),
        ("lierla", "dora output", DoraOptions(True, "output")),
        ("c3lier", "tucker", TuckerOptions(network_tucker=True)),
        ("c3lier", "dora", DoraOptions(use_dora=True)),
        ("c3lier", "dora tucker output", DoraOptions(True, "output"), TuckerOptions(network_tucker=True)),
        ("loha", "tucker", TuckerOptions(network_tucker=True)),
        ("lokr", "tucker", TuckerOptions(network_tucker=True), LokrOptions(network_factor=2)),
        ("lokr", "both", LokrOptions(network_factor=4, network_decompose_both=True)),
        ("lokr", "full", LokrOptions(network_full_matrix=True)),
        ("loha", "dora", DoraOptions(use_dora=True)),
        ("loha", "dora output", DoraOptions(True, "output"), TuckerOptions(network_tucker=True)),
        ("lokr", "dora", DoraOptions(use_dora=True)),
        ("universal", "rows", DoraOptions(use_dora=True)),
        ("experts", "rows", DoraOptions(use_dora=True)),
        ("lokr", "dora output", DoraOptions(True, "output"), LokrOptions(network_factor=2)),
        ("eh", "2", EhOptions(network_groups=2)),
    )
}
SPECS["boft"] = dataclasses.replace(SPECS["boft"], rank=10, conv_rank=10)  # layers of 10 outputs need a size of 10
SPECS["lokr"] = dataclasses.replace(SPECS["lokr"], rank=1, conv_rank=1)  # low-rank where the layers are this small
SPECS["lokr tucker"] = dataclasses.replace(SPECS["lokr tucker"], rank=1, conv_rank=1)
SPECS["lokr both"] = dataclasses.replace(SPECS["lokr both"], rank=1, conv_rank=1)


def trained(spec: AdapterSpec, strength: float = 1.0) -> Network:
    """A network after three steps of Adam towards random outputs, at this strength."""
    net = network(layers(), spec).train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    with net.attached(), net.at_strength(strength):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            with net.drawing(1, step, (0, 1, 2)), net.at_timesteps(torch.tensor([10, 500, 990])):
                for adapter in net:
                    y = adapter.module(input_of(adapter.module))
                    (y - torch.randn(y.shape, generator=generator)).square().mean().backward()
            optimizer.step()
    return net.eval()
