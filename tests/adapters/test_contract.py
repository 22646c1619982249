"""What holds for every adapter type in the registry; a new type is tested here without an edit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from adapter_layers import expected, input_of, layers, network, shake, with_weight
from adapter_specs import SPECS
from torch import Tensor

from trainer.adapters.base import AdapterSpec
from trainer.adapters.export import ExportSettings, export_network
from trainer.adapters.file import read_lora, write_lora
from trainer.adapters.folded import folded
from trainer.errors import AdapterError
from trainer.models.precision import install

every_type = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def outputs(net, batch: int = 3) -> dict[str, Tensor]:
    """What each adapted layer gives when it is called, by key."""
    return {adapter.key: adapter.module(input_of(adapter.module, batch)) for adapter in net}


@every_type
def test_starts_as_the_bare_model(spec: AdapterSpec) -> None:
    net = network(layers(), spec)
    bare = outputs(net)
    with net.attached():
        for key, y in outputs(net).items():
            torch.testing.assert_close(y, bare[key], rtol=1e-6, atol=1e-6)


@every_type
def test_strength_zero_is_the_bare_layer_bit_for_bit(spec: AdapterSpec) -> None:
    net = network(layers(), spec)
    bare = outputs(net)
    shake(net)
    with net.attached():
        assert any(not torch.equal(y, bare[key]) for key, y in outputs(net).items())
        with net.at_strength(0):
            assert all(torch.equal(y, bare[key]) for key, y in outputs(net).items())
        assert net.strength.value == 1.0


@every_type
def test_gradient_reaches_every_trainable_tensor_and_nothing_else(spec: AdapterSpec) -> None:
    net = network(layers(), spec)
    shake(net)
    with net.attached():
        for adapter in net:
            adapter.module(input_of(adapter.module)).square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for adapter in net for p in adapter.module.parameters())


@every_type
@pytest.mark.parametrize("strength", [1.0, -1.0, 0.5])
def test_forward_is_the_sum_of_weights(spec: AdapterSpec, strength: float) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    with net.attached(), net.at_strength(strength):
        for adapter in net:
            x = input_of(adapter.module)
            torch.testing.assert_close(adapter.module(x), expected(adapter, x, strength), rtol=1e-4, atol=1e-5)


@every_type
@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_folded_into_the_weights_it_does_the_same_and_comes_off_bit_for_bit(spec: AdapterSpec, strength: float) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    before = {adapter.key: copy.deepcopy(adapter.module.state_dict()) for adapter in net}
    with net.attached(), net.at_strength(strength):
        wanted = outputs(net)
        with folded(net, strength):
            inside = outputs(net)
        assert all(torch.equal(y, wanted[key]) for key, y in outputs(net).items())
    with folded(net, strength):
        unattached = outputs(net)
    for key, y in wanted.items():
        torch.testing.assert_close(inside[key], y, rtol=1e-4, atol=1e-5)
        assert torch.equal(unattached[key], inside[key])
    for adapter in net:
        for name, value in adapter.module.state_dict().items():
            assert torch.equal(value, before[adapter.key][name])


@every_type
def test_strength_per_sample(spec: AdapterSpec) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    values = [-1.0, 0.5, 0.0]
    with net.attached(), net.at_strength(torch.tensor(values)):
        for adapter in net:
            x = input_of(adapter.module)
            y = adapter.module(x)
            for row, value in enumerate(values):
                wanted = expected(adapter, x[row : row + 1], value)
                torch.testing.assert_close(y[row : row + 1], wanted, rtol=1e-4, atol=1e-5)


@every_type
def test_gradients_are_those_of_the_summed_weight(spec: AdapterSpec) -> None:
    """Input and parameter gradients of the fast path against autograd through `delta`."""
    net = network(layers(), spec).eval()
    shake(net)
    values = torch.tensor([-1.0, 0.5, 0.25])
    with net.attached():
        for adapter in net:
            parameters = [p for p in adapter.parameters() if p.requires_grad]
            for strength in (0.5, values):
                x = input_of(adapter.module).requires_grad_()
                with net.at_strength(strength):
                    y = adapter.module(x)
                probe = torch.linspace(-1, 1, y.numel()).view(y.shape)
                ours = torch.autograd.grad((y * probe).sum(), [x, *parameters])
                each = torch.as_tensor(strength).expand(3).tolist()
                rows = [expected(adapter, x[row : row + 1], value) for row, value in enumerate(each)]
                wanted = torch.autograd.grad((torch.cat(rows) * probe).sum(), [x, *parameters])
                for got, want in zip(ours, wanted, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@every_type
def test_eject_restores_the_layer_bit_for_bit(spec: AdapterSpec) -> None:
    records = layers()
    before = [(copy.deepcopy(record.module.state_dict()), dict(record.module.__dict__)) for record in records]
    net = network(records, spec)
    shake(net)
    with net.attached():
        outputs(net)
    for record, (state, attributes) in zip(records, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in record.module.state_dict().items())
        assert record.module.__dict__ == attributes
        assert "forward" not in record.module.__dict__


@every_type
def test_save_load_gives_the_same_output(spec: AdapterSpec, tmp_path) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    path = write_lora(tmp_path / "a.safetensors", net.export(torch.float32), {})
    again = network(layers(), spec, seed=9).eval()
    report = again.load(read_lora(path)[0])
    assert (report.matched, report.unmatched, report.untouched) == (len(net), (), ())
    with net.attached():
        wanted = outputs(net)
    with again.attached():
        for key, y in outputs(again).items():
            torch.testing.assert_close(y, wanted[key], rtol=1e-6, atol=1e-6)


@every_type
@pytest.mark.parametrize("strength", [2.0, -0.5])
def test_strength_is_baked_exactly_once_and_divided_out_again(spec: AdapterSpec, strength: float) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    if not all(adapter.scalable for adapter in net):
        with pytest.raises(AdapterError, match="Set network_strength to 1"):
            net.export(torch.float32, strength)
        return
    baked = network(layers(), spec).eval()
    baked.load(net.export(torch.float32, strength))
    again = network(layers(), spec).eval()
    again.load(net.export(torch.float32, strength), baked=strength)
    for one, two, three in zip(net, baked, again, strict=True):
        torch.testing.assert_close(two.delta(), strength * one.delta(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(three.delta(), one.delta(), rtol=1e-5, atol=1e-6)


@every_type
def test_files_of_another_alpha_keep_their_delta(spec: AdapterSpec) -> None:
    net = network(layers(), spec).eval()
    shake(net)
    other = network(layers(), dataclasses.replace(spec, alpha=8.0, conv_alpha=1.0)).eval()
    other.load(net.export(torch.float32))
    for one, two in zip(net, other, strict=True):
        torch.testing.assert_close(two.delta(), one.delta(), rtol=1e-5, atol=1e-6)


@every_type
def test_two_networks_in_one_process_are_independent(spec: AdapterSpec) -> None:
    first, second = network(layers(), spec, seed=1), network(layers(), spec, seed=2)
    bare = outputs(second)
    shake(first)
    with first.attached(), second.attached(), first.at_strength(0.25):
        assert second.strength.value == 1.0
        for key, y in outputs(second).items():
            torch.testing.assert_close(y, bare[key], rtol=1e-6, atol=1e-6)


@every_type
def test_a_second_network_stacks_on_a_frozen_one(spec: AdapterSpec) -> None:
    records = layers()
    first, second = network(records, spec, seed=1).eval(), network(records, spec, seed=2).eval()
    first.requires_grad_(False)
    shake_frozen = {name: torch.randn_like(p) * 0.2 for name, p in first.named_parameters()}
    first.load_state_dict({**first.state_dict(), **shake_frozen})
    shake(second)
    with first.attached(), second.attached(), second.at_strength(0.5):
        for one, two in zip(first, second, strict=True):
            x = input_of(two.module).requires_grad_()
            y = two.module(x)
            wanted = expected(one, x, 1.0) + expected(two, x, 0.5) - expected(two, x, 0.0)
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
            y.sum().backward()
            assert x.grad is not None
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters() if p.requires_grad)
    assert all("forward" not in record.module.__dict__ for record in records)


@every_type
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_stored_half_precision_under_a_float32_input(spec: AdapterSpec, stored: torch.dtype) -> None:
    """The base layer keeps its stored weight, the arithmetic is float32, ejecting gives the casting forward back."""
    records = layers()
    for record in records:
        record.module.to(stored)
        install(record.module, torch.float32)
    before = {record.key: (record.module.weight, record.module.forward) for record in records}
    net = network(records, spec).eval()
    shake(net)
    with net.attached(), net.at_strength(0.5):
        for adapter in net:
            wide = copy.copy(adapter.module)
            bias = wide.bias
            wide._parameters = {**wide._parameters, "bias": None if bias is None else bias.float()}
            x = input_of(wide)
            ours, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
            y = adapter.module(ours)
            shift = adapter.delta_bias()
            shift = None if shift is None else 0.5 * shift
            want = with_weight(wide, wanted, wide.weight.float() + 0.5 * adapter.delta(), shift)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
            y.square().sum().backward()
            want.square().sum().backward()
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    for record in records:
        weight, forward = before[record.key]
        assert record.module.weight is weight and weight.dtype == stored
        assert record.module.forward is forward


@every_type
def test_the_same_generator_gives_the_same_start(spec: AdapterSpec) -> None:
    one, two, other = (network(layers(), spec, seed) for seed in (4, 4, 5))
    state, twin = one.state_dict(), two.state_dict()
    assert state and all(torch.equal(value, twin[name]) for name, value in state.items())
    trainable = [name for name, p in one.named_parameters() if p.requires_grad and p.abs().sum() > 0]
    assert all(not torch.equal(state[name], other.state_dict()[name]) for name in trainable)


@every_type
def test_state_resumes_bit_for_bit(spec: AdapterSpec) -> None:
    net = network(layers(), spec)
    shake(net)
    again = network(layers(), spec, seed=3)
    again.load_state_dict(net.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert all(name.startswith("adapters.") for name in net.state_dict())


@every_type
@pytest.mark.parametrize("strength", [1.0, -1.5])
def test_exported_as_plain_lora_of_full_rank_it_merges_to_the_forward(spec: AdapterSpec, strength: float) -> None:
    """The reader is the definition: alpha / rank · up · down."""
    net = network(layers(), spec).eval()
    shake(net)
    strength = strength if next(iter(net)).scalable else 1.0
    exported = export_network(net, torch.float32, strength, ExportSettings("lora", rank=64))
    biased = any(adapter.delta_bias() is not None for adapter in net)
    if biased or any(adapter.module.weight.ndim < 2 for adapter in net):
        assert exported.form == "native" and "own format" in exported.message
        return
    assert exported.form == "lora" and exported.error == 0.0 and exported.message == ""
    with net.attached(), net.at_strength(strength):
        for adapter in net:
            own = {side: exported.tensors[f"{adapter.key}.lora_{side}.weight"].flatten(1) for side in ("down", "up")}
            delta = own["up"] @ own["down"] * (float(exported.tensors[f"{adapter.key}.alpha"]) / len(own["down"]))
            x, weight = input_of(adapter.module), adapter.module.weight
            summed = weight + delta.view(weight.shape)
            torch.testing.assert_close(adapter.module(x), with_weight(adapter.module, x, summed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "loha tucker", "loha dora"])
def test_loha_through_rank_r_squared_is_the_dense_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These layers are so small that they go the dense way; here the other one passes the same tests."""
    monkeypatch.setattr("trainer.adapters.loha.thin_pays", lambda *sizes: True)
    spec = SPECS[name]
    for strength in (1.0, -0.5):
        test_forward_is_the_sum_of_weights(spec, strength)
    test_strength_per_sample(spec)
    test_gradients_are_those_of_the_summed_weight(spec)
    test_stored_half_precision_under_a_float32_input(spec, torch.bfloat16)
