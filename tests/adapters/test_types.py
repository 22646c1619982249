"""Every type: train a few steps, save, read the file with a closed form of a few lines, compare with the training.

The readers know only the file's tensors and the base weight, and follow what A1111, Forge and ComfyUI do with them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapter_layers import BLOCKS, PARTS, input_of, layers, with_weight
from adapter_readers import OURS, READERS, lora, merged
from adapter_specs import SPECS, trained

from trainer.adapters.base import ADAPTERS, AdapterSpec
from trainer.adapters.dylora import DyloraOptions
from trainer.adapters.file import read_lora, write_lora
from trainer.adapters.lokr import LokrOptions
from trainer.adapters.network import build_network
from trainer.adapters.timesteps import TimestepOptions
from trainer.adapters.tucker import TuckerOptions


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("name", OURS)
def test_what_a_reader_merges_is_what_was_trained(name: str, strength: float, tmp_path) -> None:
    spec = OURS[name]
    net = trained(spec)
    if strength != 1.0 and not all(adapter.scalable for adapter in net):
        pytest.skip("its file has no place for a strength; that it says so is a contract test")
    path = write_lora(tmp_path / "a.safetensors", net.export(torch.float32, strength), {})
    tensors, _ = read_lora(path)
    changed = 0.0
    with net.attached(), net.at_strength(strength):
        for adapter in net:
            file = {key[len(adapter.key) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{adapter.key}.")}
            assert set(file) <= set(adapter.file_tensors), "only the tensors it advertises"
            base = adapter.module.weight
            weight, shift = merged(spec.type, base, {key: tensor.float() for key, tensor in file.items()})
            x = input_of(adapter.module)
            torch.testing.assert_close(
                with_weight(adapter.module, x, weight, shift), adapter.module(x), rtol=2e-5, atol=2e-5
            )
            changed = max(changed, float((weight - base).abs().max()))
    assert changed > 0.01, "three steps have moved it"


OTHER = {
    "network_timestep_rank": 1, "network_unit": 1, "network_factor": 2, "network_groups": 2,
    "network_dora_axis": "output",
}  # fmt: skip


def other_values() -> list[tuple[str, str, AdapterSpec, AdapterSpec]]:
    """(type, option, two settings) for every option that a type declares, and rank and alpha where they count."""
    found = []
    for name, kind in ADAPTERS.items():
        if name not in READERS:
            continue
        rank = {"boft": 10, "lierla": 4, "c3lier": 4, "dylora": 4}.get(name, 1)
        small = dataclasses.replace(SPECS[name], rank=rank, conv_rank=0)
        if kind.ranked:
            found += [(name, "network_rank", small, dataclasses.replace(small, rank=2 * rank))]
            found += [(name, "network_alpha", small, dataclasses.replace(small, alpha=11.0))]
        for section in kind.sections:
            for option in dataclasses.fields(section):
                value = OTHER.get(option.name, not option.default)
                together = {"use_dora": True} if option.name == "network_dora_axis" else {}
                before = section(**together)
                pair = (before, dataclasses.replace(before, **{option.name: value}))
                found.append((name, option.name, *(dataclasses.replace(small, options={section: o}) for o in pair)))
    return found


@pytest.mark.parametrize(
    ("name", "option", "before", "after"), other_values(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_option_changes_the_file(name: str, option: str, before: AdapterSpec, after: AdapterSpec) -> None:
    one, two = (trained(given).export(torch.float32) for given in (before, after))
    assert set(one) != set(two) or any(
        tensor.shape != two[key].shape or not torch.equal(tensor, two[key]) for key, tensor in one.items()
    )


@pytest.mark.parametrize("name", ["universal", "experts"])
def test_scaled_rows_are_trained_and_are_rows_of_the_up_matrix(name: str) -> None:
    """U of the file is diag(1 + rows)·U of the same network with rows 0, up to the balance of its columns."""
    net = trained(OURS[f"{name} rows"])
    with_rows = {adapter.key: adapter.delta().flatten(1).detach() for adapter in net}
    learned = {adapter.key: adapter.rows.detach().clone() for adapter in net}
    assert all(rows.abs().max() > 0.01 for rows in learned.values())
    with torch.no_grad():
        for adapter in net:
            adapter.rows.zero_()
    for adapter in net:
        torch.testing.assert_close(
            (1 + learned[adapter.key])[:, None] * adapter.delta().flatten(1), with_rows[adapter.key]
        )


def test_a_dylora_cut_to_fewer_ranks_is_what_was_trained_at_them() -> None:
    """Cut to b ranks with alpha·b/rank; b is drawn anew for each step and is the same in all layers."""
    spec = AdapterSpec("dylora", rank=8, alpha=3.0, options={DyloraOptions: DyloraOptions(network_unit=2)})
    net = trained(spec)
    file, seen = net.export(torch.float32), set()
    for step in range(20):
        with net.attached(), net.drawing(0, step, (0, 1, 2)):
            (active,) = {len(adapter.pair()[0]) for adapter in net}
            seen.add(active)
            adapter = next(iter(net))
            x = input_of(adapter.module)
            y = adapter.module(x)
        down, up = (file[f"{adapter.key}.lora_{side}.weight"] for side in ("down", "up"))
        cut = {"lora_down.weight": down[:active], "lora_up.weight": up[:, :active], "alpha": 3.0 * active / 8}
        weight, _ = lora(adapter.module.weight, cut)
        torch.testing.assert_close(y, with_weight(adapter.module, x, weight), rtol=1e-4, atol=1e-5)
    assert seen == {2, 4, 6, 8}


@pytest.mark.parametrize("name", ["lierla", "c3lier tucker"])
def test_fewer_ranks_at_noisier_timesteps(name: str) -> None:
    """T-LoRA with 2 to 6 ranks: 6 at t = 0, ⌊4·250/1000⌋ = 1 more than 2 at t = 750, 2 at t = 999; outside of training
    and in the text encoder all of them."""
    spec = dataclasses.replace(SPECS[name], rank=6, conv_rank=6)
    spec = dataclasses.replace(spec, options={**spec.options, TimestepOptions: TimestepOptions(2)})
    net = trained(spec)
    with net.attached():
        for adapter in net:
            x, bare = input_of(adapter.module), adapter.module.weight
            ranks = (6, 3, 2) if adapter.part == "unet" else (6, 6, 6)
            with net.drawing(0, 0, (0, 1, 2)), net.at_timesteps(torch.tensor([0, 750, 999])):
                y = adapter.module(x)
            down, up = adapter.pair()
            for row, active in enumerate(ranks):
                delta = up[:, :active] @ down[:active].flatten(1) * adapter.alpha / 6
                want = with_weight(adapter.module, x[row : row + 1], bare + delta.view(bare.shape))
                torch.testing.assert_close(y[row : row + 1], want, rtol=1e-4, atol=1e-5)
            with net.at_timesteps(torch.tensor([0, 750, 999])):
                want = with_weight(adapter.module, x, bare + adapter.delta())
                torch.testing.assert_close(adapter.module(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["network_decompose_both", "network_tucker"])
@pytest.mark.parametrize("rank, full, idle", [(1, False, False), (16, False, True), (1, True, True)])
def test_lokr_tells_of_options_without_effect(option: str, rank: int, full: bool, idle: bool) -> None:
    lokr = LokrOptions(network_factor=4, network_full_matrix=full)
    plain = AdapterSpec("lokr", rank, options={LokrOptions: lokr})
    section = TuckerOptions if option == "network_tucker" else LokrOptions
    changed = {**plain.options, section: dataclasses.replace(plain[section], **{option: True})}
    lines: list[str] = []
    shapes = []
    for spec in (plain, dataclasses.replace(plain, options=changed)):
        built = build_network(layers(), spec, BLOCKS, "Full", PARTS, torch.Generator().manual_seed(0), lines.append)
        shapes.append({name: value.shape for name, value in built.state_dict().items()})
    assert (shapes[0] == shapes[1]) is idle
    assert [line.split()[0] for line in lines] == ([option] if idle else [])
