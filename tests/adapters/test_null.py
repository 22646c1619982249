"""Null-LoRA: where it writes, how it starts, that its file is a plain LoRA, and what its caches and files refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_layers import input_of, layers, merged, network, shake, with_weight

from trainer.adapters import bases
from trainer.adapters.base import AdapterSpec
from trainer.adapters.bases import SvdParams
from trainer.errors import AdapterError
from trainer.maths.subspace import is_orthonormal, least_rows, product_norm, product_svd, truncated_svd
from trainer.params.network import NetworkOptions
from trainer.params.spaces import NullParams

SPEC = AdapterSpec("null", rank=4, alpha=6.0)
WIDE = AdapterSpec("null", rank=4, alpha=6.0, conv_rank=2, conv_alpha=1.0)


@pytest.mark.parametrize(("fan_out", "fan_in", "count"), [(5, 12, 4), (8, 8, 3), (12, 5, 2), (8, 10, 4)])
def test_least_rows_against_numpy(fan_out, fan_in, count) -> None:
    weight = torch.randn(fan_out, fan_in, generator=torch.Generator().manual_seed(1))
    rows = least_rows(weight, count)
    assert is_orthonormal(rows, 1e-5)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    smallest = np.sort([*values, *[0.0] * (fan_in - len(values))])[:count]
    np.testing.assert_allclose(np.sort((weight @ rows.T).norm(dim=0).numpy()), smallest, atol=1e-4)


def test_products_and_truncated_svd_against_numpy() -> None:
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(6, 40, generator=generator), torch.randn(30, 6, generator=generator)
    np.testing.assert_allclose(float(product_norm(down, up)), np.linalg.norm((up @ down).numpy()), rtol=1e-5)
    u, s, v = product_svd(down, up)
    np.testing.assert_allclose(((u * s) @ v).numpy(), (up @ down).numpy(), atol=1e-4)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd((up @ down).numpy(), compute_uv=False)[:6], rtol=1e-4)
    wide = torch.randn(600, 8, generator=generator) @ torch.randn(8, 700, generator=generator)
    wide = wide + 0.01 * torch.randn(600, 700, generator=generator)
    u, s, v = truncated_svd(wide, 8)
    exact = np.linalg.svd(wide.numpy(), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), exact[:8], rtol=1e-4)
    np.testing.assert_allclose(float((wide - (u * s) @ v).norm()), np.sqrt((exact[8:] ** 2).sum()), rtol=1e-3)


def test_the_frozen_halves_lie_in_the_null_space_where_there_is_one() -> None:
    net = network(layers(), WIDE)
    for adapter in net:
        weight = adapter.module.weight.flatten(1)
        down, up = adapter.frozen_down.flatten(1), adapter.frozen_up
        assert is_orthonormal(down, 1e-5) and is_orthonormal(up.T, 1e-5)
        if weight.shape[1] - weight.shape[0] >= len(down):
            assert (weight @ down.T).abs().max() < 1e-5 * weight.norm()
        values = torch.linalg.svdvals(weight)
        full = weight.shape[0] <= weight.shape[1]
        wanted = values[-up.shape[1] :].norm() if full else torch.tensor(0.0)
        torch.testing.assert_close((up.T @ weight).norm(), wanted, rtol=1e-3, atol=1e-4)
    assert not any(name.startswith("frozen") for name, _ in next(iter(net)).named_parameters())


def test_starts_at_zero_with_a_gradient_for_both_halves_and_is_linear() -> None:
    net = network(layers(), SPEC)
    adapter = net.adapters["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"]
    assert not adapter.delta().any()
    with net.attached():
        adapter.module(input_of(adapter.module)).square().sum().backward()
    assert adapter.up.grad.abs().sum() > 0 and adapter.down.grad.abs().sum() > 0
    deltas = []
    for seed in (1, 2):
        shake(net, seed)
        deltas.append((adapter.delta().clone(), [p.detach().clone() for p in (adapter.up, adapter.down)]))
    with torch.no_grad():
        for place, parameter in enumerate((adapter.up, adapter.down)):
            parameter.copy_(deltas[0][1][place] + deltas[1][1][place])
    torch.testing.assert_close(adapter.delta(), deltas[0][0] + deltas[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, -1.5])
def test_the_file_is_a_plain_lora_that_merges_to_the_forward(strength) -> None:
    net = network(layers(), WIDE)
    shake(net)
    exported = net.export(torch.float32, strength)
    half = net.export(torch.float16, strength)
    with net.attached(), net.at_strength(strength):
        for adapter in net:
            x = input_of(adapter.module)
            delta = merged(exported, adapter.key).float()
            torch.testing.assert_close(
                adapter.module(x), with_weight(adapter.module, x, adapter.module.weight + delta), rtol=1e-4, atol=1e-5
            )
            rounded = merged(half, adapter.key).float()
            assert (rounded - delta).norm() < 2e-3 * delta.norm()
    down, up = (exported[f"{adapter.key}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


def test_continues_in_the_files_own_null_space_or_refuses() -> None:
    records = layers()
    net = network(records, SPEC)
    shake(net)
    exported = net.export(torch.float32)
    for record in records:
        record.module.weight.data.add_(torch.randn_like(record.module.weight))
    other = network(records, SPEC)
    other.load(exported)
    for one, two in zip(net, other, strict=True):
        torch.testing.assert_close(two.delta(), one.delta(), rtol=1e-4, atol=1e-5)
    plain = network(records, AdapterSpec("lierla", rank=4, alpha=2.0))
    shake(plain)
    with pytest.raises(AdapterError, match="outside the null space.*lierla"):
        other.load(plain.export(torch.float32))


def test_a_rank_without_two_halves_is_refused() -> None:
    with pytest.raises(AdapterError, match="needs a rank from 2 to 16 in this layer, and got 1"):
        network(layers(), AdapterSpec("null", rank=1, alpha=1.0))
    with pytest.raises(AdapterError, match="and got 1"):
        network(
            layers(),
            AdapterSpec(
                "null", rank=4, alpha=1.0, options={NetworkOptions: NetworkOptions(network_block_ranks="M00=1")}
            ),
        )


def test_the_cache_is_used_for_the_same_weights_only(tmp_path, monkeypatch) -> None:
    path = tmp_path / "svd.safetensors"
    spec = AdapterSpec("null", rank=4, alpha=6.0, options={SvdParams: SvdParams(svd_cache_path=str(path))})
    first = network(layers(), spec)
    written = path.read_bytes()

    def refuse(*_):
        raise RuntimeError("decomposed again")

    monkeypatch.setattr("trainer.adapters.null.least_rows", refuse)
    again = network(layers(), spec)
    assert all(torch.equal(a.frozen_down, b.frozen_down) for a, b in zip(first, again, strict=True))
    assert path.read_bytes() == written
    changed = layers()
    changed[4].module.weight.data[0, 0] += 1
    with pytest.raises(RuntimeError, match="decomposed again"):
        network(changed, spec)
    other = tmp_path / "other.safetensors"
    bases.write_lora(other, {"x.null_down": torch.zeros(2, 2)}, {})
    for name, message in ((other, "was not written here"), (tmp_path / "svd.pt", "must end in .safetensors")):
        wrong = AdapterSpec("null", options={SvdParams: SvdParams(svd_cache_path=str(name))})
        with pytest.raises(AdapterError, match=message):
            network(layers(), wrong)


def test_activations_are_left_alone_in_the_directions_they_use() -> None:
    """Inputs of half the dimensions: ΔW·x is 0 for them whatever is learned, and not for others."""
    spec = AdapterSpec("null", rank=4, alpha=4.0, options={NullParams: NullParams(network_null_space="activations")})
    net = network(layers(), spec)
    generator = torch.Generator().manual_seed(5)
    for adapter in net:
        fan_in = adapter.fan_in
        inside = torch.randn(fan_in // 2, fan_in, generator=generator)
        inputs = torch.randn(200, fan_in // 2, generator=generator) @ inside
        assert adapter.calibrate(inputs)
    shake(net)
    for adapter in net:
        assert not adapter.calibrate(torch.randn(50, adapter.fan_in))  # it has learned something
        down, _ = adapter.pair()
        assert is_orthonormal(adapter.frozen_down.flatten(1), 1e-4)
        inside = torch.linalg.svd(adapter.held).Vh[: len(adapter.held)]
        assert (adapter.delta().flatten(1) @ inside.T).abs().max() < 1e-4
        assert adapter.delta().norm() > 0.1 and down.shape[0] == 4


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_activations_with_factors_in_half_precision_are_saved_within_its_rounding(precision) -> None:
    spec = AdapterSpec("null", rank=4, alpha=4.0, options={NullParams: NullParams(network_null_space="activations")})
    net = network(layers(), spec)
    for adapter in net:
        assert adapter.calibrate(torch.randn(200, adapter.fan_in, generator=torch.Generator().manual_seed(5)))
    shake(net)
    exact = [adapter.delta() for adapter in net]
    for adapter, wanted in zip(net.to(precision), exact, strict=True):
        assert adapter.as_lora() is not None
        found = adapter.delta().float()
        assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_the_bases_stay_float32_in_a_network_of_half_precision() -> None:
    net = network(layers(), SPEC).to(torch.bfloat16)
    adapter = next(iter(net))
    assert adapter.frozen_down.dtype == torch.float32 and adapter.up.dtype == torch.bfloat16
    assert is_orthonormal(adapter.frozen_down.flatten(1), 1e-5)
