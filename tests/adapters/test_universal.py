"""Universal LoRA and the files of bases: what spans them, what is found out about a collection, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from adapter_layers import input_of, layers, merged, network, shake, with_weight

from trainer.adapters.base import AdapterSpec
from trainer.adapters.file import read_lora, write_lora
from trainer.adapters.universal import UniversalParams
from trainer.cli.main import main
from trainer.engine.catalogue import catalogue
from trainer.errors import AdapterError, JobError
from trainer.maths.subspace import is_orthonormal
from trainer.params.codec import load
from trainer.tools.basis import make_basis

K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
Q = "lora_te_text_model_encoder_layers_0_mlp_fc2"
SIZES = {K: (8, 12), Q: (12, 24)}


def spec(path="", rank=3, **more):
    own = UniversalParams(basis_path=str(path), **more)
    return AdapterSpec("universal", rank=rank, alpha=5.0, options={UniversalParams: own})


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).Q


@pytest.fixture
def collection(tmp_path):
    """Four LoRAs whose ΔW = U0·C·V0 lie in one 3-dimensional pair of spaces, each split in its own way."""
    folder, deltas = tmp_path / "loras", {key: [] for key in SIZES}
    generator = torch.Generator().manual_seed(3)
    for number in range(4):
        tensors = {}
        for seed, (key, (fan_out, fan_in)) in enumerate(SIZES.items()):
            core, gauge = (torch.randn(3, 3, generator=generator) for _ in range(2))
            up = orthonormal(fan_out, 3, seed) @ core @ gauge
            down = torch.linalg.inv(gauge) @ orthonormal(fan_in, 3, 9 + seed).T
            name = key if number else key.replace("lora_unet_", "unet.").replace("lora_te_", "text_encoder.")
            spelled = ("lora_up.weight", "lora_down.weight") if number else ("lora_B.weight", "lora_A.weight")
            tensors |= {f"{name}.{spelled[0]}": up.contiguous(), f"{name}.{spelled[1]}": down.contiguous()}
            tensors |= {f"{name}.alpha": torch.tensor(6.0 + number)}
            deltas[key].append(up @ down * (6.0 + number) / 3)
        write_lora(folder / "sub" / f"{number}.safetensors", tensors, {})
    return folder, deltas


def test_without_a_file_the_bases_are_the_models_main_directions() -> None:
    net = network(layers(), spec())
    for adapter in net:
        weight = adapter.module.weight.detach().flatten(1).numpy()
        u, _, v = np.linalg.svd(weight, full_matrices=False)
        down, up = adapter.frozen_down.flatten(1).numpy(), adapter.frozen_up.numpy()
        np.testing.assert_allclose(down.T @ down, v[:3].T @ v[:3], atol=1e-4)
        np.testing.assert_allclose(up @ up.T, u[:, :3] @ u[:, :3].T, atol=1e-4)
        assert [name for name, _ in adapter.named_parameters()] == ["core"] and not adapter.delta().any()
    adapter = net.adapters[K]
    with net.attached():
        adapter.module(input_of(adapter.module)).square().sum().backward()
    assert adapter.core.grad.abs().min() > 0


def test_the_file_merges_to_the_forward() -> None:
    net = network(layers(), spec())
    shake(net)
    exported = net.export(torch.float32, -2.0)
    with net.attached(), net.at_strength(-2.0):
        for adapter in net:
            x, weight = input_of(adapter.module), adapter.module.weight
            summed = weight + merged(exported, adapter.key).float().view(weight.shape)
            torch.testing.assert_close(adapter.module(x), with_weight(adapter.module, x, summed), rtol=1e-4, atol=1e-5)


def test_the_tool_finds_the_common_spaces_and_the_network_uses_them(collection, tmp_path) -> None:
    folder, deltas = collection
    report = make_basis(folder, tmp_path / "basis.safetensors", rank=3)
    assert (report.loras, report.layers, report.groups, report.left_out) == (4, 2, (), {})
    assert report.explained == pytest.approx(1.0, abs=1e-5)
    assert report.chance == pytest.approx((9 / 96 + 9 / 288) / 2)
    net = network(layers(), spec(report.path))
    for seed, (key, (fan_out, fan_in)) in enumerate(SIZES.items()):
        adapter = net.adapters[key]
        space = orthonormal(fan_in, 3, 9 + seed)
        torch.testing.assert_close(adapter.frozen_down.T @ adapter.frozen_down, space @ space.T, rtol=0, atol=1e-4)
        space = orthonormal(fan_out, 3, seed)
        torch.testing.assert_close(adapter.frozen_up @ adapter.frozen_up.T, space @ space.T, rtol=0, atol=1e-4)
    own = net.adapters["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"]
    assert is_orthonormal(own.frozen_down, 1e-4) and own.frozen_down.shape == (3, 8)
    more = network(layers(), spec(report.path, rank=5)).adapters[K]
    assert is_orthonormal(more.frozen_down, 1e-4) and is_orthonormal(more.frozen_up.T, 1e-4)
    torch.testing.assert_close(more.frozen_down[:3], net.adapters[K].frozen_down)
    started = network(layers(), spec(report.path, network_basis_mean=True))
    torch.testing.assert_close(started.adapters[K].delta(), torch.stack(deltas[K]).mean(0), rtol=1e-3, atol=1e-4)


def test_one_random_start_and_one_lora_twice_are_found(tmp_path) -> None:
    generator, folder = torch.Generator().manual_seed(4), tmp_path / "loras"
    start = torch.randn(4, 640, generator=generator)
    for name in ("a", "b", "c"):
        noise = torch.randn(4, 640, generator=generator)
        down = noise if name == "c" else start + 0.5 * noise
        tensors = {f"{K}.lora_down.weight": down, f"{K}.lora_up.weight": torch.randn(320, 4, generator=generator)}
        write_lora(folder / f"{name}.safetensors", tensors, {})
    gauge = torch.randn(4, 4, generator=generator)
    down, up = torch.linalg.inv(gauge) @ tensors[f"{K}.lora_down.weight"], tensors[f"{K}.lora_up.weight"] @ gauge
    write_lora(folder / "d.safetensors", {f"{K}.lora_down.weight": down, f"{K}.lora_up.weight": up}, {})
    write_lora(folder / "e.safetensors", {f"{K}.hada_w1_a": up}, {})
    dora = {f"{K}.lora_down.weight": down, f"{K}.lora_up.weight": up, f"{K}.dora_scale": torch.ones(320, 1)}
    write_lora(folder / "f.safetensors", dora, {})
    for name, size in (("g", 6), ("h", 5)):  # one layer of two sizes: for different base models
        other = {f"{Q}.lora_{side}.weight": torch.ones(*shape) for side, shape in (("down", (4, size)), ("up", (9, 4)))}
        write_lora(folder / f"{name}.safetensors", other, {})
    lines: list[str] = []
    report = make_basis(folder, tmp_path / "basis.safetensors", rank=8, tell=lines.append)
    assert report.layers == 1 and any("different sizes" in line for line in lines)
    assert report.groups == (("a.safetensors", "b.safetensors"),) and report.loras == 5
    assert report.left_out["d.safetensors"] == "it is the same as c.safetensors"
    assert "no plain LoRA" in report.left_out["e.safetensors"] and "no plain LoRA" in report.left_out["f.safetensors"]
    assert "began from the same random numbers" in lines[0]
    rows = read_lora(report.path)[0]["lora_unet_" + K.removeprefix("lora_unet_") + ".basis_down"]
    of_a, of_b = (read_lora(folder / f"{name}.safetensors")[0][f"{K}.lora_down.weight"] for name in "ab")
    assert (of_a @ rows.T).norm() > 0.999 * of_a.norm() > 1.05 * (of_b @ rows.T).norm()  # a counts, b does not


def test_the_layout_of_the_fork_is_read(tmp_path) -> None:
    generator, tensors = torch.Generator().manual_seed(5), {}
    mean = {side: torch.randn(size, generator=generator) for side, size in (("down", 12), ("up", 8))}
    for side, size in (("down", 12), ("up", 8)):
        name = f"unet.down.blocks.0.attentions.0.transformer.blocks.0.attn2.to.k.lora_{side}.weight"
        tensors |= {f"{name}.mean": mean[side], f"{name}.basis": orthonormal(size, 2, 6).contiguous()}
    write_lora(tmp_path / "fork.safetensors", tensors, {})
    adapter = network(layers(), spec(tmp_path / "fork.safetensors", network_basis_mean=True)).adapters[K]
    torch.testing.assert_close(adapter.delta(), torch.outer(mean["up"], mean["down"]), rtol=1e-4, atol=1e-5)
    inside = orthonormal(12, 2, 6).T
    torch.testing.assert_close((inside @ adapter.frozen_down.T) @ adapter.frozen_down, inside, rtol=0, atol=1e-5)


def test_continues_its_own_file_and_refuses_what_lies_outside(collection, tmp_path) -> None:
    report = make_basis(collection[0], tmp_path / "basis.safetensors", rank=3)
    net = network(layers(), spec(report.path))
    shake(net)
    exported = net.export(torch.float16)
    again, without = network(layers(), spec(report.path)), network(layers(), spec())
    again.load(exported)
    without.load(exported)
    for one, two, three in zip(net, again, without, strict=True):
        assert (two.delta() - one.delta()).norm() < 2e-3 * one.delta().norm()
        assert (three.delta() - one.delta()).norm() < 2e-3 * one.delta().norm()
    other = network(layers(), spec())
    shake(other)
    with pytest.raises(AdapterError, match="outside the bases of this network"):
        again.load(other.export(torch.float32))
    large = network(layers(), AdapterSpec("lierla", rank=6, alpha=1.0))
    shake(large)
    with pytest.raises(AdapterError, match="network_rank to 6"):
        without.load(large.export(torch.float32))


def test_wrong_files_are_refused(tmp_path) -> None:
    write_lora(tmp_path / "lora.safetensors", {f"{K}.lora_up.weight": torch.ones(2, 2)}, {})
    with pytest.raises(AdapterError, match="not a file of bases"):
        network(layers(), spec(tmp_path / "lora.safetensors"))
    name = "unet.mid.block.to.k.lora_{}.weight.{}"
    tensors = {
        name.format(side, part): torch.ones(*shape)
        for side in ("down", "up")
        for part, shape in (("mean", (4,)), ("basis", (4, 2)))
    }
    write_lora(tmp_path / "other.safetensors", tensors, {})
    with pytest.raises(AdapterError, match="another kind of base model"):
        network(layers(), spec(tmp_path / "other.safetensors"))
    with pytest.raises(AdapterError, match="at most 8 in this layer, and got 9"):
        network(layers(), spec(rank=9))
    raw = {"format": 1, "lora_data_directory": "x", "network_type": "universal"}
    with pytest.raises(JobError, match="basis_path = 'gone'.*leave it empty"):
        load({**raw, "basis_path": "gone"}, catalogue())
    with pytest.raises(JobError, match="network_basis_mean.*no mean to start from"):
        load({**raw, "network_basis_mean": True}, catalogue())


def test_the_command(collection, tmp_path, capsys) -> None:
    out = tmp_path / "basis.safetensors"
    assert main(["basis", str(collection[0]), "--out", str(out), "--rank", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loras"] == 4 and report["rank"] == 2 and report["explained"] < 0.99 and out.is_file()
    assert main(["basis", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "holds no .safetensors file" in capsys.readouterr().err
    assert main(["basis", str(collection[0]), "--out", str(tmp_path / "basis.bin")]) == 1
    assert main(["basis", str(collection[0]), "--out", str(out), "--rank", "0"]) == 1
    told = capsys.readouterr().err
    assert "must end in .safetensors" in told and "at least 1 direction" in told
    assert not (tmp_path / "basis.bin").exists()
