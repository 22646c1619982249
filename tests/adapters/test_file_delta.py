"""ΔW of a file's tensors without a model, against what was trained and against closed forms of a few lines."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapter_layers import layers
from adapter_readers import OURS, merged
from adapter_specs import SPECS, trained
from torch import Tensor

from trainer.adapters.file_delta import (
    FORMS,
    KNOWN,
    FileDelta,
    by_layer,
    delta_of,
    form_of,
    limited,
    plain_layers,
    rank_of,
    recognised,
)  # fmt: skip
from trainer.adapters.library import functional
from trainer.errors import AdapterError

LORA_FORM = ("lierla", "c3lier", "dylora", "null", "universal", "experts")
FORM = {**{name: name for name in FORMS}, **dict.fromkeys(LORA_FORM, "lora"), "eh": "lokr"}
WITHOUT_RANK = ("ia3", "full", "norm", "eh", "oft", "boft")


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("name", OURS)
def test_delta_of_a_file_is_what_was_trained(name: str, strength: float) -> None:
    spec = OURS[name]
    net = trained(spec)
    if strength != 1.0 and not all(adapter.scalable for adapter in net):
        pytest.skip("its file has no place for a strength")
    files, largest = by_layer(net.export(torch.float32, strength)), 0.0
    assert set(files) == {adapter.key for adapter in net}
    for adapter in net:
        base, file = adapter.module.weight, files[adapter.key]
        found = delta_of(file, base, adapter.key)
        weight, shift = merged(spec.type, base, file)
        close(found.delta, weight - base)
        close(found.delta, strength * adapter.delta().detach())
        assert found.norm == pytest.approx(float((weight - base).norm()), rel=1e-4, abs=1e-6)
        assert found.form == FORM[spec.type]
        assert found.rank == (0 if spec.type in WITHOUT_RANK else len(adapter_rank(file)))
        assert (found.bias is None) is (shift is None)
        if found.bias is not None and shift is not None:
            close(found.bias, shift)
        largest = max(largest, found.norm)
    assert largest > 0.01, "three steps have moved it"


def adapter_rank(file: dict[str, Tensor]) -> Tensor:
    """A tensor of a layer whose first axis is the rank; whole matrices of a LoKr have none."""
    names = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a1.weight")
    return next((file[name] for name in names if name in file), torch.zeros(0))


@pytest.mark.parametrize("name", [name for name in OURS if OURS[name].type in (*LORA_FORM, "loha", "lokr", "full")])
def test_delta_without_the_weight_has_the_same_numbers(name: str) -> None:
    net = trained(OURS[name])
    for key, file in by_layer(net.export(torch.float32)).items():
        base = net.adapters[key].module.weight
        if "dora_scale" in file:
            with pytest.raises(AdapterError, match=f"{key}.*Give the base model"):
                delta_of(file, None, key)
            file = {name: tensor for name, tensor in file.items() if name != "dora_scale"}
        alone = delta_of(file).delta
        close(alone.flatten(1), delta_of(file, base).delta.flatten(1))


@pytest.mark.parametrize("name", ["ia3", "glora", "oft", "boft"])
def test_forms_on_the_weight_ask_for_it(name: str) -> None:
    for key, file in by_layer(trained(OURS[name]).export(torch.float32)).items():
        with pytest.raises(AdapterError, match=f"{key}.*Give the base model"):
            delta_of(file, None, key)


def test_glora_in_the_newer_layout_is_the_same_change() -> None:
    net = trained(SPECS["glora"])
    swap = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    for key, file in by_layer(net.export(torch.float32)).items():
        base = net.adapters[key].module.weight
        newer = {swap.get(name, name): tensor for name, tensor in file.items()}
        close(delta_of(newer, base).delta, delta_of(file, base).delta)
        want = base @ newer["a1.weight"] @ newer["a2.weight"] + newer["b1.weight"] @ newer["b2.weight"]
        close(delta_of(newer, base).delta, want * newer["alpha"] / rank_of(file))


def test_the_old_file_of_eh_is_its_block_for_every_group() -> None:
    base, block = torch.randn(6, 9), torch.randn(2, 3)
    found = delta_of({"linear.weight": block}, base)
    assert torch.equal(found.delta, torch.block_diag(block, block, block)) and found.form == "eh"
    with pytest.raises(AdapterError, match="do not fit"):
        delta_of({"linear.weight": block}, torch.randn(7, 9))


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_alpha_limits_rotations_as_lycoris_does(kind: str, alpha: float) -> None:
    theirs = functional("diag_oft" if kind == "oft" else "boft")
    if theirs is None:
        pytest.skip("LyCORIS needs a newer torch")
    torch.manual_seed(0)
    base, shape = torch.randn(8, 5), (2, 4, 4) if kind == "oft" else (2, 2, 4, 4)
    blocks = torch.randn(shape) * 0.3
    want = theirs.diff_weight(base, blocks, None, constraint=alpha * len(base), backend="torch")
    found = delta_of({"oft_blocks": blocks, "alpha": torch.tensor(alpha)}, base)
    close(found.delta, want.view(base.shape))
    held = limited(blocks, alpha * len(base))
    assert torch.equal(held, blocks) is (alpha != 1e-3), "1e-3 limits, 10 does not"


def test_a_limited_rotation_is_loaded_as_it_acts() -> None:
    net = trained(SPECS["oft"])
    tensors = net.export(torch.float32)
    for key in net.adapters:
        tensors[f"{key}.alpha"] = torch.tensor(1e-3)
    net.load(tensors)
    for key, file in by_layer(tensors).items():
        adapter = net.adapters[key]
        close(adapter.delta().detach(), delta_of(file, adapter.module.weight).delta)


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_on_either_axis_set_the_norms_of_the_merged_weight(axis: int) -> None:
    torch.manual_seed(0)
    base, down, up = torch.randn(6, 6, 3, 3), torch.randn(2, 6, 3, 3), torch.randn(6, 2, 1, 1)
    magnitude = torch.rand(6) + 0.5
    shape = [1, 1, 1, 1]
    shape[axis] = 6
    file = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude.view(shape)}
    total = base + delta_of(file, base).delta
    others = [other for other in range(4) if other != axis]
    close(total.square().sum(others).sqrt(), magnitude)
    plain = base + delta_of({name: t for name, t in file.items() if name != "dora_scale"}, base).delta
    cosines = torch.nn.functional.cosine_similarity(
        total.movedim(axis, 0).flatten(1), plain.movedim(axis, 0).flatten(1), dim=1
    )
    close(cosines, torch.ones(6))


def test_unknown_tensors_are_refused_by_name() -> None:
    lora = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(3, 2)}
    for more in ("rescale", "bm.weight", "lora_magnitude"):
        with pytest.raises(AdapterError, match=f"unet_x: '{more}' beside those of form lora"):
            form_of({**lora, more: torch.ones(1)}, "unet_x")
    with pytest.raises(AdapterError, match="'first_seen', 'second_seen' cannot be read"):
        form_of({"first_seen": torch.ones(1), "second_seen": torch.ones(1)})
    with pytest.raises(AdapterError, match=r"'unet_x\.first_seen' is no tensor of a LoRA"):
        by_layer({"unet_x.first_seen": torch.ones(1)})


@pytest.mark.parametrize("form", FORMS)
def test_incomplete_layers_are_refused(form: str) -> None:
    for layout in FORMS[form].layouts:
        for lacking in layout:
            left = {name: torch.ones(2, 2, 2, 2) for name in layout if name != lacking}
            whole = any(left.keys() == other for other in FORMS[form].layouts)
            if not whole:
                with pytest.raises(AdapterError, match="no complete layer|beside those of form"):
                    form_of(left)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_computed() -> None:
    lora = {"lora_down.weight": torch.ones(2, 12), "lora_up.weight": torch.ones(6, 2)}
    assert delta_of(lora, torch.ones(6, 12)).delta.shape == (6, 12)
    for weight in (torch.ones(12, 6), torch.ones(6, 24), torch.ones(3, 24), torch.ones(6, 4, 3, 1)[:, :, :2]):
        with pytest.raises(AdapterError, match="do not fit"):
            delta_of(lora, weight)
    with pytest.raises(AdapterError, match="do not fit"):
        delta_of({**lora, "lora_up.weight": torch.ones(6, 3)})
    with pytest.raises(AdapterError, match="do not fit"):
        delta_of({"diff": torch.ones(4, 6)}, torch.ones(6, 4))
    with pytest.raises(AdapterError, match="do not fit"):
        delta_of({**lora, "dora_scale": torch.ones(1, 6)}, torch.ones(6, 12))


def test_norm_of_factors_needs_no_product() -> None:
    torch.manual_seed(0)
    file = {"lora_down.weight": torch.randn(3, 50), "lora_up.weight": torch.randn(40, 3), "alpha": torch.tensor(-6.0)}
    found = delta_of(file)
    assert found.factors is not None and found.whole is None
    assert found.norm == pytest.approx(float(found.delta.norm()), rel=1e-5)
    with pytest.raises(TypeError):
        FileDelta("lora", 3).delta  # noqa: B018


def test_files_of_plain_lora_are_told_from_others() -> None:
    plain = trained(SPECS["lierla"]).export(torch.float32)
    found = plain_layers(plain)
    assert found is not None and set(found) == {adapter.key for adapter in trained(SPECS["lierla"])}
    for other in ("c3lier tucker", "lierla dora", "loha", "eh", "norm"):
        assert plain_layers(trained(SPECS[other]).export(torch.float32)) is None
    assert plain_layers({}) is None and plain_layers({"x.lora_down.weight": torch.ones(1, 1)}) is None


def test_every_tensor_that_a_type_writes_is_known() -> None:
    for name, spec in SPECS.items():
        small = dataclasses.replace(spec, options=spec.options)
        for adapter in trained(small):
            assert set(adapter.tensors()) <= KNOWN, name
            form = recognised(adapter.tensors())
            assert form is not None and form.name == FORM[spec.type]
    assert len(layers()) > 10
