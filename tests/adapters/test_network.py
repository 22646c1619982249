"""Choosing layers, stacking, strength, loading and exporting: what is written once for all types."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from adapter_layers import BLOCKS, PARTS, input_of, layers, network, shake, with_weight

from trainer.adapters.base import ADAPTERS, AdapterSpec
from trainer.adapters.network import build_network
from trainer.errors import AdapterError, AtelierError
from trainer.models.layers import layers_of

PLAIN = AdapterSpec("lierla", rank=4, alpha=2.0)
CONV = AdapterSpec("c3lier", rank=4, alpha=2.0, conv_rank=2, conv_alpha=6.0)


def built(spec=PLAIN, blocks=BLOCKS, element="Full", parts=PARTS, records=None):
    return build_network(records or layers(), spec, blocks, element, parts, torch.Generator().manual_seed(0))


def names(net) -> set[str]:
    return {key.rpartition("_0_")[2] for key in net.adapters}


def test_spellings_of_types() -> None:
    assert ADAPTERS.canonical("LoRA") == "lierla" and ADAPTERS.canonical("locon") == "c3lier"
    with pytest.raises(AtelierError, match="Did you mean 'lierla'"):
        ADAPTERS.get("lirla")


def test_lierla_takes_transformer_and_text_layers() -> None:
    assert names(built()) == {"proj_in", "attn1_to_q", "attn2_to_k", "ff_net_2", "self_attn_k_proj", "mlp_fc2"}


def test_c3lier_adds_residual_blocks_and_samplers_with_the_conv_rank() -> None:
    net = built(CONV)
    assert len(net) == len([record for record in layers() if "norm" not in record.kind])
    shapes = {key.rpartition("_0_")[2]: (tuple(a.down.shape), a.alpha) for key, a in net.adapters.items()}
    assert shapes["conv1"] == ((2, 6, 3, 3), 6.0) and shapes["conv"] == ((2, 6, 3, 3), 6.0)
    assert shapes["conv_shortcut"] == ((4, 6, 1, 1), 2.0) and shapes["time_emb_proj"] == ((4, 12), 2.0)


def test_conv_rank_zero_is_the_linear_one() -> None:
    net = built(AdapterSpec("locon", rank=4, alpha=2.0))
    assert {(a.rank, a.alpha, a.scale) for a in net} == {(4, 2.0, 0.5)}


def test_elements_blocks_and_parts() -> None:
    assert names(built(element="CrossAttention")) == {"attn2_to_k"}
    assert names(built(element="SelfAttention")) == {"attn1_to_q"}
    assert names(built(element="None")) == names(built())
    assert names(built(blocks=("M00",))) == {"ff_net_2"}
    assert set(built(parts=("te1",)).parts()) == {"te1"}
    assert names(built(blocks=("BASE", "M00"), parts=("unet",))) == {"ff_net_2"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"blocks": ()}, r"network_blocks \(none\) excludes all 6"),
        ({"parts": ("te2",)}, r"network_targets \(te2\)"),
        ({"element": "CrossAttention", "parts": ("te1",)}, "network_element CrossAttention"),
        ({"element": "Corss"}, "Known: Full, CrossAttention, SelfAttention"),
    ],
)
def test_an_empty_choice_says_what_emptied_it(choice, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        built(**choice)


@pytest.mark.parametrize("numbers", [{"rank": 0}, {"alpha": 0.0}, {"conv_rank": -1}, {"conv_alpha": -1.0}])
def test_bad_ranks_and_alphas_are_refused(numbers) -> None:
    with pytest.raises(AdapterError, match="must be"):
        AdapterSpec("lierla", **numbers)


def test_a_rank_above_the_width_is_allowed() -> None:
    net = built(AdapterSpec("lierla", rank=64, alpha=1.0))
    shake(net)
    with net.attached():
        for adapter in net:
            x = input_of(adapter.module)
            weight = adapter.module.weight + adapter.delta()
            torch.testing.assert_close(
                adapter.module(x).flatten(), with_weight(adapter.module, x, weight).flatten(), rtol=1e-4, atol=1e-5
            )


def test_two_layers_of_one_name_are_refused() -> None:
    records = layers()
    with pytest.raises(AdapterError, match="same name"):
        built(records=[*records, records[4]])


def test_networks_eject_in_reverse_order() -> None:
    records = layers()
    first, second = built(records=records), built(records=records)
    first.attach()
    second.attach()
    with pytest.raises(AdapterError, match="reverse order"):
        first.eject()
    assert all(adapter.attached for adapter in first)
    second.eject()
    first.eject()
    assert all("forward" not in record.module.__dict__ for record in records)
    with pytest.raises(AdapterError, match="reverse order"):
        next(iter(first)).eject()


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    net = built()
    net.attach()
    before = {a.key: a.module.forward for a in net}
    with pytest.raises(AdapterError, match="already attached"):
        net.attach()
    assert all(a.module.forward is before[a.key] for a in net)
    net.eject()


def test_a_forward_of_someone_else_is_kept_and_given_back() -> None:
    record = layers()[4]
    plain = record.module.forward
    record.module.forward = stranger = lambda x: 2 * plain(x)
    net = built(records=[record])
    shake(net)
    x = input_of(record.module)
    with net.attached():
        (adapter,) = net
        torch.testing.assert_close(record.module(x), 2 * plain(x) + x @ adapter.delta().T)
    assert record.module.forward is stranger


def test_strength_returns_after_an_error() -> None:
    net = built()
    with pytest.raises(RuntimeError), net.at_strength(0.25):
        assert net.strength.value == 0.25
        raise RuntimeError
    assert net.strength.value == 1.0
    with pytest.raises(ValueError, match=r"\(B,\)"):
        net.strength.value = torch.ones(2, 2)


def test_parts_groups_and_mean_weight() -> None:
    net = built()
    groups = net.trainable()
    assert [group["name"] for group in groups] == ["unet", "te1"]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    shake(net)
    mean = net.mean_abs_weight()
    by_hand = torch.cat([p.flatten() for a in net.parts()["te1"] for p in a.parameters()]).abs().mean()
    torch.testing.assert_close(mean["te1"], by_hand.detach())
    net.requires_grad_(False)
    assert net.trainable() == []


def test_export_names_precision_and_alpha() -> None:
    net = built(CONV)
    shake(net)
    tensors = net.export(torch.float16)
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{key}.lora_down.weight"].shape == (2, 6, 3, 3)
    assert tensors[f"{key}.lora_up.weight"].shape == (10, 2, 1, 1)
    assert tensors[f"{key}.lora_up.weight"].dtype == torch.float16
    alpha = tensors[f"{key}.alpha"]
    assert alpha.shape == () and alpha.dtype == torch.float32 and alpha == 6.0
    assert list(tensors) == sorted(tensors, key=lambda name: name.split(".")[0])
    assert net.bfloat16().export(None)[f"{key}.lora_down.weight"].dtype == torch.bfloat16


def test_strength_is_shared_between_the_factors_with_the_sign_on_up() -> None:
    net = built()
    shake(net)
    key = "lora_te_text_model_encoder_layers_0_mlp_fc2"
    plain, baked = net.export(torch.float32), net.export(torch.float32, -4.0)
    torch.testing.assert_close(baked[f"{key}.lora_down.weight"], 2 * plain[f"{key}.lora_down.weight"])
    torch.testing.assert_close(baked[f"{key}.lora_up.weight"], -2 * plain[f"{key}.lora_up.weight"])
    assert baked[f"{key}.alpha"] == plain[f"{key}.alpha"]
    for call in (lambda: net.export(None, 0.0), lambda: net.load(baked, baked=0.0)):
        with pytest.raises(AdapterError, match="0"):
            call()


def test_exported_tensors_are_copies() -> None:
    net = built()
    tensors = net.export()
    shake(net)
    assert all(tensor.abs().sum() == 0 for name, tensor in tensors.items() if "lora_up" in name)


def test_load_reads_other_spellings_and_reports_the_rest() -> None:
    record = layers()[5]
    sgm = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    known = dataclasses.replace(record, also=("unet.down_blocks.0.attn2.to_k",))
    net = built(records=[known, layers()[4]])
    down, up = torch.randn(4, 12), torch.randn(8, 4)
    wanted = up @ down
    for head, spelling in (
        (sgm, ("lora_down.weight", "lora_up.weight")),
        ("unet.down_blocks.0.attn2.to_k", ("lora_A.weight", "lora_B.weight")),
        ("unet.down_blocks.0.attn2.to_k", ("lora.down.weight", "lora.up.weight")),
    ):
        file = {f"{head}.{spelling[0]}": down, f"{head}.{spelling[1]}": up, "lora_te9_x.alpha": torch.tensor(1.0)}
        report = net.load(file, {record.key: (sgm,)})
        assert report.matched == 1 and report.unmatched == ("lora_te9_x.alpha",)
        assert report.untouched == (layers()[4].key,)
        # No alpha in the file means alpha = rank: the file's ΔW is up·down, whatever this network's alpha is.
        torch.testing.assert_close(net.adapters[record.key].delta(), wanted, rtol=1e-5, atol=1e-5)


def test_a_file_for_nothing_here_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"None of the 1 tensors .* lora_unet_x\.alpha"):
        built().load({"lora_unet_x.alpha": torch.tensor(1.0)})
    with pytest.raises(AdapterError, match="None of the 0"):
        built().load({})


def test_another_rank_is_an_error_with_both_and_changes_nothing() -> None:
    net, other = built(), built(AdapterSpec("lierla", rank=8, alpha=2.0))
    shake(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(AdapterError, match=r"the file has rank 8, this network has rank 4.*Set network_rank to 8"):
        net.load(other.export())
    mixed = {**net.export(), **{k: v for k, v in other.export().items() if "te_text" in k}}
    with pytest.raises(AdapterError, match="rank 8"):
        net.load(mixed)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(AdapterError, match="Set network_conv_rank to 3"):
        built(CONV).load(built(AdapterSpec("c3lier", rank=4, alpha=2.0, conv_rank=3)).export())


def test_files_of_other_kinds_and_shapes_are_refused() -> None:
    net = built()
    key = next(iter(net.adapters))
    with pytest.raises(AdapterError, match=r"hada_w1_a.*network_type"):
        net.load({f"{key}.hada_w1_a": torch.zeros(2, 2)})
    file = net.export()
    file[f"{key}.lora_up.weight"] = torch.zeros(99, 4)
    with pytest.raises(AdapterError, match="another kind of base model"):
        net.load(file)
    sgm = {**net.export(), f"other.{'lora_up.weight'}": torch.zeros(8, 4)}
    with pytest.raises(AdapterError, match="twice"):
        net.load(sgm, {key: ("other",)})


def test_a_linear_file_fits_a_1x1_convolution() -> None:
    net = built()
    shake(net)
    file = {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in net.export().items()}
    again = built()
    again.load(file)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


def test_autocast_is_followed() -> None:
    net = network(layers(), PLAIN)
    shake(net)
    with net.attached(), torch.autocast("cpu", dtype=torch.bfloat16):
        for adapter in net:
            y = adapter.module(input_of(adapter.module))
            assert y.dtype == torch.bfloat16
            y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for checkpointed in (False, True):
        net = network(layers(), CONV)
        shake(net)
        with net.attached():
            for adapter in net:
                x = input_of(adapter.module).requires_grad_()
                y = checkpoint(adapter.module, x, use_reentrant=reentrant) if checkpointed else adapter.module(x)
                y.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_blocks_are_repeated_at_the_strength_they_ran_at() -> None:
    """Gradient checkpointing repeats a block during the backward pass, when the strength is another one again."""
    model = tiny.model("sd1")
    net = build_network(layers_of(model), PLAIN, BLOCKS, "Full", ("unet",), torch.Generator().manual_seed(0))
    shake(net)
    x, context = torch.randn(2, 4, 8, 8), model.encode_prompts(["a", "b"])
    gradients = []
    for on in (False, True):
        model.set_gradient_checkpointing(on, net.repeated)
        net.zero_grad()
        with net.attached():
            with net.at_strength(torch.tensor([0.25, -0.25])):
                y = model.predict(x, torch.tensor([5, 900]), context)
            y.square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)
