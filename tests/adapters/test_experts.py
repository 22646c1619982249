"""Experts: one shared down matrix, gates that learn, routing by the input and what is left of it in a file."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapter_layers import input_of, layers, network, shake, with_weight
from torch import nn

from trainer.adapters.base import AdapterSpec
from trainer.adapters.experts import _of_pairs
from trainer.adapters.export import export_network
from trainer.engine.catalogue import catalogue
from trainer.engine.memory import step_bytes
from trainer.errors import AdapterError, JobError
from trainer.maths.lowrank import low_rank_delta
from trainer.params.codec import load
from trainer.params.core import Network
from trainer.params.spaces import ExpertParams
from trainer.stages.routing import Routing

K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"


def records():
    """The usual layers and a second one of the width of a first."""
    first = next(record for record in layers() if record.key.endswith("attn1_to_q"))
    module = nn.Linear(8, 6).requires_grad_(False)
    return [*layers(), dataclasses.replace(first, key=first.key.replace("to_q", "to_v"), module=module)]


def spec(**own):
    return AdapterSpec("experts", rank=3, alpha=6.0, options={ExpertParams: ExpertParams(**own)})


def test_layers_of_one_width_share_their_down_matrix_and_it_is_trained_once() -> None:
    net = network(records(), spec(num_experts=3))
    downs = {key: id(adapter.common.down) for key, adapter in net.adapters.items()}
    twins = [key for key in downs if "attn1" in key]
    assert len(twins) == 2 and downs[twins[0]] == downs[twins[1]]
    assert downs[K] != downs["lora_te_text_model_encoder_layers_0_self_attn_k_proj"]
    trained = [id(p) for group in net.trainable() for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(net.parameters()))
    assert len(set(downs.values())) == len(downs) - 1
    shake(net)
    again = network(records(), spec(num_experts=2))
    again.load(net.export(torch.float32))
    for one, two in zip(net, again, strict=True):
        torch.testing.assert_close(two.delta(), one.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_starts_at_zero_and_every_expert_learns_something_of_its_own(count) -> None:
    net = network(layers(), spec(num_experts=count))
    adapter = net.adapters[K]
    assert adapter.experts.shape[0] == count and not adapter.delta().any()
    optimizer = torch.optim.SGD([p for p in adapter.parameters()], lr=0.3)
    with net.attached():
        for _ in range(3):
            optimizer.zero_grad()
            (adapter.module(input_of(adapter.module)) - 1).square().mean().backward()
            optimizer.step()
    if count > 1:
        assert adapter.gates.grad.abs().max() > 0 and adapter.mixture().std() > 0
        ups = adapter.experts.detach()
        assert all((one - two).abs().max() > 1e-3 for n, one in enumerate(ups) for two in ups[:n])


@pytest.mark.parametrize("routing", ["constant", "input"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_start_is_exactly_the_bare_layer_whatever_products_round_to(count, routing) -> None:
    net = network(layers(), spec(num_experts=count, network_routing=routing))
    for adapter in net:
        x = input_of(adapter.module)
        bare = adapter.module(x)
        with net.attached():
            assert torch.equal(adapter.module(x), bare)
        # Every summand of a product is zero, so no order of summing and no fused multiply-add can leave a rest.
        gates, experts = _of_pairs(adapter.mixture(), 0), _of_pairs(adapter.experts, 0, 0.5)
        assert not (gates.view(-1, 1, 1) * experts).any() and adapter.experts.any()


def test_constant_gates_fold_into_one_lora() -> None:
    net = network(layers(), spec())
    shake(net)
    exported = export_network(net, torch.float32, 1.5)
    assert (exported.form, exported.error, exported.facts["network_module"]) == ("lora", 0.0, "networks.lora")
    with net.attached(), net.at_strength(1.5):
        for adapter in net:
            gates = torch.softmax(adapter.gates.detach().double(), 0)
            up = sum(g * b for g, b in zip(gates, adapter.experts.detach().double(), strict=True))
            delta = (2.0 * 1.5 * up @ adapter.common.down.detach().double().flatten(1)).float()
            x, weight = input_of(adapter.module), adapter.module.weight
            wanted = with_weight(adapter.module, x, weight + delta.view(weight.shape))
            torch.testing.assert_close(adapter.module(x), wanted, rtol=1e-4, atol=1e-5)
            sides = [exported.tensors[f"{adapter.key}.lora_{side}.weight"] for side in ("down", "up")]
            file = [side.flatten(1) for side in sides]
            torch.testing.assert_close(low_rank_delta(*file, 2.0), delta, rtol=1e-4, atol=1e-5)


def test_an_ordinary_lora_is_refused_because_its_down_matrices_differ() -> None:
    plain = network(records(), AdapterSpec("lierla", rank=3, alpha=3.0))
    shake(plain)
    with pytest.raises(AdapterError, match="different down matrices.*lierla"):
        network(records(), spec()).load(plain.export(torch.float32))
    with pytest.raises(AdapterError, match="has rank 3, this network has rank 2"):
        network(records(), AdapterSpec("experts", rank=2, alpha=3.0)).load(plain.export(torch.float32))


def by_hand(adapter, x):
    """The routed update by its definition, token by token (picture by picture in a convolution)."""
    down, out = adapter.common.down.flatten(1), []
    tokens = x.flatten(0, -2) if x.ndim == 3 else x.permute(0, 2, 3, 1).flatten(0, 2)
    asked = tokens if x.ndim == 3 else x.mean(dim=(2, 3)).repeat_interleave(x.shape[2] * x.shape[3], 0)
    for token, question in zip(tokens, asked, strict=True):
        gates = torch.softmax(adapter.gates + adapter.heat * adapter.router @ question, 0)
        out.append(adapter.scale * sum(g * (b @ (down @ token)) for g, b in zip(gates, adapter.experts, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("key", [K, PROJ])
def test_routing_by_the_input(key) -> None:
    net = network(layers(), spec(network_routing="input"))
    adapter = net.adapters[key]
    assert not adapter.delta().any()
    shake(net, size=0.5)
    x = input_of(adapter.module)
    with net.attached(), net.at_strength(-0.5):
        base = adapter.module.forward.__self__._base(x)
        got = (adapter.module(x) - base).detach()
        with net.at_strength(torch.tensor([1.0, 0.0, -2.0])):
            each = (adapter.module(x) - base).detach()
    wanted = by_hand(adapter, x).detach()
    shaped = wanted.view_as(got) if x.ndim == 3 else wanted.view(3, 5, 6, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, -0.5 * shaped, rtol=1e-4, atol=1e-5)
    for row, strength in enumerate((1.0, 0.0, -2.0)):
        torch.testing.assert_close(each[row], strength * shaped[row], rtol=1e-4, atol=1e-5)


def test_the_fold_is_the_least_squares_answer_and_its_error_is_said() -> None:
    net = network(layers(), spec(network_routing="input"))
    shake(net, size=0.5)
    adapter = net.adapters[K]
    x = input_of(adapter.module, batch=8)
    with net.attached(), net.drawing(0, 0, range(8)):
        adapter.module(x)
    tokens = x.flatten(0, 1)
    middle, wanted = tokens @ adapter.common.down.detach().T, by_hand(adapter, x).detach() / adapter.scale
    answer = torch.linalg.lstsq(middle, wanted).solution.T
    folded = adapter.as_lora()
    torch.testing.assert_close(folded.up.detach(), answer, rtol=1e-3, atol=1e-4)
    error = float((wanted - middle @ answer.T).norm() / wanted.norm())
    assert folded.error == pytest.approx(error, rel=1e-3) and error > 0.01
    exported = export_network(net, torch.float32, 1.0)
    assert exported.form == "lora" and 0 < exported.error <= error
    assert "differs from what was trained" in exported.message
    adapter.heat = 0.0
    assert adapter.as_lora().error == 0.0


def test_the_balance_pushes_the_router_towards_all_experts() -> None:
    net = network(layers(), spec(network_routing="input"))
    adapter = net.adapters[K]
    x = input_of(adapter.module)
    with net.attached(), net.drawing(0, 0, range(3)):
        adapter.module(x)
        assert adapter.balance().item() == pytest.approx(0.0, abs=1e-6)
        adapter.gates.data.copy_(torch.tensor([30.0, 0.0, 0.0, 0.0]))
        adapter.module(x)
    assert adapter.balance().item() == pytest.approx(3.0, abs=1e-4)  # one expert of four: 4·1² − 1
    adapter.gates.data.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    adapter.balance().backward()
    assert adapter.gates.grad[0] > 0 > adapter.gates.grad[1] and adapter.router.grad.abs().sum() > 0


def test_the_router_fades_out() -> None:
    raw = {"format": 1, "lora_data_directory": "x", "network_type": "experts", "network_routing": "input"}
    job = load(raw, catalogue()).job
    assert Routing.wanted(job)
    stage, net = Routing(job), network(layers(), spec(network_routing="input"))
    heats = []
    for done in (0.0, 0.5, 0.7, 0.9, 0.99):
        stage.step(net, round(100 * done), 100)
        heats.append({adapter.heat for adapter in net})
    assert heats[0] == heats[1] == {1.0} and heats[3] == heats[4] == {0.0}
    assert heats[2].pop() == pytest.approx(0.5)


def test_enable_effilora_is_another_spelling() -> None:
    raw = {"format": 1, "lora_data_directory": "x", "enable_effilora": "True"}
    job = load(raw, catalogue()).job
    assert job[Network].network_type == "experts"
    assert load(job.to_dict(), catalogue()).job == job
    with pytest.raises(JobError, match="enable_effilora = True: means network_type experts, but network_type is null"):
        load({**raw, "network_type": "null"}, catalogue())


def test_a_prediction_of_memory_leaves_shared_parameters_as_they_are() -> None:
    net = network(records(), spec())
    twins = [adapter for adapter in net if "attn1" in adapter.key]
    kept = [(p, p.clone()) for p in net.parameters()]
    with net.attached():
        used = step_bytes([net], lambda: sum(twin.module(torch.zeros(1, 4, 8)).sum() for twin in twins))
    assert used > 0
    for (p, before), now in zip(kept, net.parameters(), strict=True):
        assert p is now and torch.equal(p, before)
    assert all(type(adapter.common.down) is nn.Parameter for adapter in net)
