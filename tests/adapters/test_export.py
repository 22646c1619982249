"""The form of a file: exact where it can be, the best plain LoRA where it is asked for, the own one otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from adapter_layers import layers, merged, network, shake

from trainer.adapters.base import AdapterSpec
from trainer.adapters.dora import DoraOptions
from trainer.adapters.export import ExportSettings, export_network
from trainer.adapters.metadata import FileFacts, build_metadata


def built(kind, rank=4, size=0.2):
    spec = AdapterSpec(kind, rank=rank, alpha=6.0, conv_rank=2, conv_alpha=1.0)
    net = network(layers(), spec).eval()
    shake(net, size=size)
    return net


def best(net, rank):
    """(the optimum of each layer, the relative error over all) by numpy's SVD."""
    found, rest, whole = {}, 0.0, 0.0
    for adapter in net:
        delta = adapter.delta().detach().double().flatten(1).numpy()
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        found[adapter.key] = (u[:, :rank] * s[:rank]) @ v[:rank]
        rest, whole = rest + (s[rank:] ** 2).sum(), whole + (s**2).sum()
    return found, (rest / whole) ** 0.5


@pytest.mark.parametrize("kind", ["lierla", "c3lier", "null"])
def test_what_is_a_lora_already_is_written_as_it_is(kind) -> None:
    net = built(kind)
    exported = export_network(net, torch.float16, 0.5)
    own = net.export(torch.float16, 0.5)
    assert set(exported.tensors) == set(own) and all(torch.equal(exported.tensors[name], own[name]) for name in own)
    assert (exported.form, exported.error, exported.message) == ("lora", 0.0, "")
    facts = exported.facts
    assert facts["network_module"] == "networks.lora" and facts["network_rank"] == 4 and facts["network_alpha"] == 6.0
    noted = build_metadata(FileFacts(name="a", **facts), "minimal")
    assert noted.get("atelier_network_type") == ("null" if kind == "null" else None)


@pytest.mark.parametrize("kind", ["full", "loha", "lierla"])
def test_the_error_is_that_of_the_best_lora_of_the_rank(kind) -> None:
    net = built(kind)
    for adapter in net:
        if getattr(adapter, "diff_b", None) is not None:
            adapter.diff_b.data.zero_()
    found, error = best(net, 3)
    exported = export_network(net, torch.float32, 2.0, ExportSettings("lora", rank=3))
    assert exported.form == "lora" and exported.error == pytest.approx(error, rel=1e-3) and error > 0.05
    assert f"by {error:.2%}, more than export_max_error (5.0%) allows" in exported.message
    for key, wanted in found.items():
        np.testing.assert_allclose(merged(exported.tensors, key).flatten(1).numpy(), 2 * wanted, atol=1e-4)
        down, up = (exported.tensors[f"{key}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
        torch.testing.assert_close(down.norm(dim=1) * 2**-0.5, up.norm(dim=0) * 2**-0.5, rtol=1e-3, atol=1e-5)
    noted = build_metadata(FileFacts(name="a", **exported.facts), "minimal")
    assert noted["ss_network_module"] == "networks.lora" and noted["ss_network_dim"] == "3"
    assert noted["atelier_export_format"] == "lora"
    assert float(noted["atelier_export_error"]) == pytest.approx(error, 1e-3)
    assert noted["atelier_network_type"] == kind


def test_auto_keeps_the_own_form_beyond_the_limit_and_says_so() -> None:
    net = built("oft", size=0.05)
    _, error = best(net, 4)
    kept = export_network(net, torch.float32, 1.0, ExportSettings("auto", rank=4, max_error=error * 0.9))
    assert kept.form == "native" and any(name.endswith("oft_blocks") for name in kept.tensors)
    assert f"rank 4 it would differ from what was trained by {error:.1%}" in kept.message
    assert "not every WebUI reads" in kept.message and "export_rank" in kept.message
    taken = export_network(net, torch.float32, 1.0, ExportSettings("auto", rank=4, max_error=error * 1.1))
    assert taken.form == "lora" and taken.error == pytest.approx(error, rel=1e-3)
    assert "allows" not in taken.message


@pytest.mark.parametrize("kind", ["loha", "lokr", "glora", "full", "eh", "norm"])
def test_auto_leaves_alone_what_every_webui_reads(kind) -> None:
    net = built(kind)
    exported = export_network(net, torch.float32, 1.0)
    assert exported.form == "native" and exported.message == "" and set(exported.tensors) == set(net.export())
    assert exported.facts["export"]["atelier_export_error"] == "0"


def test_native_is_native_and_a_smaller_rank_beyond_the_limit_is_not_taken() -> None:
    net = built("oft")
    assert export_network(net, None, 1.0, ExportSettings("native")).form == "native"
    lora = built("lierla")
    kept = export_network(lora, torch.float32, 1.0, ExportSettings("auto", rank=1))
    assert set(kept.tensors) == set(lora.export()) and "Raise export_rank" in kept.message
    assert "not every WebUI" not in kept.message


@pytest.mark.parametrize(("axis", "shape"), [("input", (1, 12)), ("output", (8, 1))])
def test_the_axis_of_dora_stands_in_the_shape_and_in_the_metadata(axis, shape) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # 12 inputs, 8 outputs
    own = {DoraOptions: DoraOptions(use_dora=True, network_dora_axis=axis)}
    net = network(layers(), AdapterSpec("lierla", rank=4, alpha=6.0, options=own)).eval()
    shake(net)
    native = export_network(net, torch.float32, 1.0, ExportSettings("native"))
    assert native.tensors[f"{key}.dora_scale"].shape == shape
    noted = json.loads(build_metadata(FileFacts(name="a", **native.facts), "minimal")["ss_network_args"])
    assert (noted["dora_wd"], noted["wd_on_output"]) == ("True", str(axis == "output"))
    plain = export_network(net, torch.float32, 1.0, ExportSettings("lora"))
    assert not {"dora_wd", "wd_on_output"} & set(plain.facts["network_args"])
