"""The options that several types share: each does what it says, at every strength, and nothing when it is off."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from adapter_layers import BLOCKS, PARTS, expected, input_of, layers, network, shake, with_weight
from adapter_specs import SPECS

from trainer.adapters.base import ADAPTERS, Adapter, AdapterSpec, Strength
from trainer.adapters.network import build_network
from trainer.contracts import Layer
from trainer.errors import AdapterError
from trainer.params.network import NetworkOptions, name_chosen, parse_block_ranks, parse_blocks
from trainer.stages.base import STAGES, Stage

TYPES = ADAPTERS.names()
every_type = pytest.mark.parametrize("kind", TYPES)


def spec(kind: str = "c3lier", **options) -> AdapterSpec:
    known = SPECS[kind]
    return dataclasses.replace(known, options={**known.options, NetworkOptions: NetworkOptions(**options)})


def trained(kind: str = "c3lier", **options):
    net = network(layers(), spec(kind, **options))
    shake(net)
    return net


def outputs(net, batch: int = 3, seed: int = 1, index: int = 0, samples=(0, 1, 2)) -> dict[str, torch.Tensor]:
    with net.attached(), net.drawing(seed, index, samples):
        return {a.key: a.module(input_of(a.module, batch)) for a in net}


# -- dropout -----------------------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("option", ["network_dropout", "network_rank_dropout", "network_module_dropout"])
def test_dropout_acts_inside_a_step_only_and_repeats_itself(kind: str, option: str) -> None:
    if option != "network_module_dropout" and "dropout" not in ADAPTERS.get(kind).tags():
        pytest.skip("this type has no such dropout")
    net, plain = trained(kind, **{option: 0.5}), trained(kind)
    wanted = outputs(plain)
    one, two = outputs(net), outputs(net)
    others = [outputs(net, index=index) for index in range(1, 7)]
    assert all(torch.equal(one[key], two[key]) for key in one), "a step draws the same when it is computed again"
    assert any(not torch.equal(other[key], wanted[key]) for other in others for key in one)
    assert any(not torch.equal(one[key], other[key]) for other in others for key in one), "every step draws anew"
    with net.attached():
        for adapter in net:
            y = adapter.module(input_of(adapter.module))
            torch.testing.assert_close(y, wanted[adapter.key], rtol=1e-5, atol=1e-5)


@every_type
def test_module_dropout_leaves_out_whole_layers_as_often_as_asked(kind: str) -> None:
    net = trained(kind, network_module_dropout=0.3)
    bare = {a.key: a.module(input_of(a.module)) for a in net}
    left_out = [torch.equal(y, bare[key]) for index in range(40) for key, y in outputs(net, index=index).items()]
    share, error = sum(left_out) / len(left_out), math.sqrt(0.3 * 0.7 / len(left_out))
    assert abs(share - 0.3) < 4 * error


def test_rank_dropout_by_hand() -> None:
    """Whole ranks of ΔW are missing, the others count 1/(1 − p), the same for every sample of the batch."""
    net = trained(network_rank_dropout=0.5)
    values = torch.tensor([-1.0, 0.5, 2.0])
    with net.attached(), net.at_strength(values), net.drawing(3, 7, (0, 1, 2)):
        for adapter in net:
            kept = adapter.kept_ranks(adapter.rank)
            assert set(kept.tolist()) <= {0.0, 2.0}
            delta = torch.einsum("or,r,ri->oi", adapter.up, kept, adapter.down.flatten(1)) * adapter.scale
            x = input_of(adapter.module)
            y = adapter.module(x)
            for row, value in enumerate(values.tolist()):
                weight = adapter.module.weight + value * delta.view(adapter.module.weight.shape)
                want = with_weight(adapter.module, x[row : row + 1], weight)
                torch.testing.assert_close(y[row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_neuron_dropout_keeps_the_mean_and_drops_as_often_as_asked() -> None:
    """Averaged over many steps the output is the plain one; a single number of the middle is 0 or 1/(1 − p) times."""
    net, plain = trained(network_dropout=0.4), trained()
    wanted = outputs(plain)
    with net.attached():
        adapter = net.adapters["lora_te_text_model_encoder_layers_0_mlp_fc2"]
        x, total = input_of(adapter.module), 0
        for index in range(600):
            with net.drawing(0, index, (0, 1, 2)):
                total = total + adapter.module(x)
        torch.testing.assert_close(total / 600, wanted[adapter.key], rtol=0, atol=0.15)
        with net.drawing(0, 0, (0, 1, 2)):
            mask = adapter.dropped(torch.ones(3, 50, 4))
    assert {round(v, 4) for v in mask.unique().tolist()} == {0.0, round(1 / 0.6, 4)}
    assert abs((mask == 0).float().mean() - 0.4) < 4 * math.sqrt(0.24 / 600)


@pytest.mark.parametrize("option", ["network_dropout", "network_rank_dropout", "network_module_dropout"])
def test_one_process_and_two_draw_the_same(option: str) -> None:
    """The samples 0, 1, 2, 3 in one batch, or 0, 2 here and 1, 3 there; also when a mode repeats the batch."""
    net = trained(**{option: 0.5})
    with net.attached():
        for adapter in net:
            x = input_of(adapter.module, 8)
            with net.drawing(5, 2, (0, 1, 2, 3)):
                whole = adapter.module(x)
            for samples, rows in (((0, 2), [0, 2, 4, 6]), ((1, 3), [1, 3, 5, 7])):
                with net.drawing(5, 2, samples):
                    torch.testing.assert_close(adapter.module(x[rows]), whole[rows], rtol=1e-5, atol=1e-5)


def test_chunks_of_a_prompt_draw_by_prompt() -> None:
    """Two prompts of two chunks each; the second process sees its prompt with three chunks and draws the same."""
    net = trained(network_dropout=0.5)
    (adapter,) = [a for a in net if a.key.endswith("fc2")]
    x = input_of(adapter.module, 4)
    with net.attached():
        net.draws.rows = 2
        with net.drawing(5, 2, (0, 1)):
            whole = adapter.module(x)
        net.draws.rows = 1
        with net.drawing(5, 2, (1,)):
            other = adapter.module(torch.cat([x[2:], x[:1]]))
    torch.testing.assert_close(other[:2], whole[2:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_draws(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for checkpointed in (False, True):
        net = trained(network_dropout=0.3, network_rank_dropout=0.3, network_module_dropout=0.2)
        with net.attached(), net.drawing(1, 1, (0, 1, 2)):
            for adapter in net:
                x = input_of(adapter.module).requires_grad_()
                y = checkpoint(adapter.module, x, use_reentrant=reentrant) if checkpointed else adapter.module(x)
                y.square().sum().backward()
        grads.append([torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


# -- max-norm ----------------------------------------------------------------------------------------------------------


@every_type
def test_max_norm_scales_back_what_is_above_and_leaves_the_rest(kind: str) -> None:
    if "max_norm" not in ADAPTERS.get(kind).tags():
        pytest.skip("this type has no limit")
    free = trained(kind)
    norms = {a.key: float(a.delta().detach().norm()) for a in free}
    limit = sorted(norms.values())[len(norms) // 2]
    net = trained(kind, network_max_norm=limit)
    before = {a.key: [p.clone() for p in a.parameters()] for a in net}
    net.limit_norms()
    for adapter, one in zip(net, free, strict=True):
        if norms[adapter.key] > limit * 1.0001:
            torch.testing.assert_close(adapter.delta(), one.delta() * limit / norms[adapter.key], rtol=1e-4, atol=1e-6)
        elif norms[adapter.key] < limit * 0.9999:
            assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before[adapter.key], strict=True))


@every_type
def test_the_fast_norm_is_the_norm(kind: str) -> None:
    for adapter in trained(kind):
        torch.testing.assert_close(adapter.delta_norm(), adapter.delta().norm(), rtol=1e-5, atol=1e-6)


def test_max_norm_with_frozen_down_matrices_scales_the_up_ones() -> None:
    net = trained(network_max_norm=0.01, network_freeze_down=True)
    downs = [a.down.clone() for a in net]
    net.limit_norms()
    assert all(torch.equal(a.down, down) for a, down in zip(net, downs, strict=True))
    assert all(abs(float(a.delta().detach().norm()) - 0.01) < 1e-5 for a in net)


# -- rates and ranks ---------------------------------------------------------------------------------------------------


def test_loraplus_and_block_rates_make_groups() -> None:
    net = trained(loraplus_lr_ratio=16.0, loraplus_te_lr_ratio=4.0, network_block_lrs="M00=0.5;in03=2")
    groups = {g["name"]: (g["part"], g["ratio"], len(g["params"])) for g in net.trainable()}
    assert groups == {
        "unet": ("unet", 1.0, 6),
        "unet up": ("unet", 16.0, 6),
        "unet M00": ("unet", 0.5, 1),
        "unet M00 up": ("unet", 8.0, 1),
        "unet IN03": ("unet", 2.0, 1),
        "unet IN03 up": ("unet", 32.0, 1),
        "te1": ("te1", 1.0, 2),
        "te1 up": ("te1", 4.0, 2),
    }
    ups = {id(a.up) for a in net}
    for group in net.trainable():
        assert all((id(p) in ups) == group["name"].endswith(" up") for p in group["params"])
    assert {g["name"]: g["ratio"] for g in trained(loraplus_lr_ratio=8.0).trainable()}["te1 up"] == 8.0
    assert [g["name"] for g in trained(loraplus_lr_ratio=8.0, loraplus_te_lr_ratio=1.0).trainable()] == [
        "unet",
        "unet up",
        "te1",
    ]


@every_type
def test_frozen_down_matrices_are_neither_trained_nor_missing(kind: str) -> None:
    downs = ADAPTERS.get(kind).downs
    if not downs:
        pytest.skip("this type has no down matrix")
    net = network(layers(), spec(kind, network_freeze_down=True))
    for adapter in net:
        trainable = {name for name, p in adapter.named_parameters() if p.requires_grad}
        assert trainable and not trainable & set(downs)
    assert sum(len(g["params"]) for g in net.trainable()) == sum(p.requires_grad for p in net.parameters())
    shake(net)
    again = network(layers(), spec(kind), seed=4)
    again.load(net.export(torch.float32))
    for one, two in zip(net, again, strict=True):
        torch.testing.assert_close(one.delta(), two.delta(), rtol=1e-5, atol=1e-6)


def test_rslora_scales_by_the_root_and_any_reader_agrees() -> None:
    net = trained(network_rslora=True)
    for adapter in net:
        alpha = 5.0 if adapter.kind == "conv3x3" else 3.0
        assert adapter.scale == pytest.approx(alpha / math.sqrt(adapter.rank))
    tensors = net.export(torch.float32)
    for adapter in net:
        down, up = tensors[f"{adapter.key}.lora_down.weight"], tensors[f"{adapter.key}.lora_up.weight"]
        reader = tensors[f"{adapter.key}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)
        torch.testing.assert_close(reader.view(adapter.delta().shape), adapter.delta(), rtol=1e-5, atol=1e-6)


def test_block_ranks_and_alphas_reach_the_layers_and_the_file() -> None:
    given = AdapterSpec(
        "c3lier",
        rank=4,
        alpha=3.0,
        options={
            NetworkOptions: NetworkOptions(network_block_ranks="IN0?=2;M00=6;IN03=5", network_block_alphas="BASE=1.5")
        },
    )
    net = network(layers(), given)
    found = {(a.block, a.rank, a.alpha) for a in net}
    assert found == {("IN01", 2, 3.0), ("IN03", 5, 3.0), ("M00", 6, 3.0), ("BASE", 4, 1.5)}
    tensors = net.export()
    assert {len(t) for name, t in tensors.items() if "lora_down" in name} == {2, 5, 6, 4}
    wide = network(layers(), dataclasses.replace(given, conv_rank=3, conv_alpha=9.0))
    assert {(a.rank, a.alpha) for a in wide if a.kind == "conv3x3"} == {(3, 9.0)}
    assert net.file_facts()["network_args"]["block_dims"] == "IN0?=2;M00=6;IN03=5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IN00", "not block=number"),
        ("IN99=4", "'IN99' is no block"),
        ("IN00=x", "'x' .of IN00. is not a number"),
        ("IN00=0", "must be above 0"),
        ("M00=nan", "must be above 0"),
        ("M00=-1", "must be above 0"),
    ],
)
def test_block_numbers_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blocks(text)


def test_block_numbers() -> None:
    assert parse_blocks("in00=1; OUT1*=0.25\nM00 = 2") == {"IN00": 1.0, "OUT10": 0.25, "OUT11": 0.25, "M00": 2.0}
    assert parse_blocks("*=2;M00=1")["M00"] == 1.0 and len(parse_blocks("*=2")) == 26 and parse_blocks("") == {}
    with pytest.raises(ValueError, match="not a rank"):
        parse_block_ranks("IN00=2.5")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ("*attn2*", {"attn2_to_k"}),
        ("*attn*", {"attn1_to_q", "attn2_to_k", "self_attn_k_proj"}),
        ("*attn*;!*to_q", {"attn2_to_k", "self_attn_k_proj"}),
        ("!*attn*\n!*proj_in", {"ff_net_2", "mlp_fc2"}),
        ("text_model.*.fc2", {"mlp_fc2"}),
    ],
)
def test_name_patterns_choose_layers(patterns: str, wanted: set[str]) -> None:
    records = layers()
    path = "text_model.encoder.layers.0.mlp.fc2"
    records[-1] = dataclasses.replace(records[-1], also=(path,))
    options = {NetworkOptions: NetworkOptions(network_name_filter=patterns)}
    given = AdapterSpec("lierla", rank=4, alpha=3.0, options=options)
    net = build_network(records, given, BLOCKS, "Full", PARTS, torch.Generator().manual_seed(0))
    assert {key.rpartition("_0_")[2] for key in net.adapters} == wanted


def test_patterns_that_leave_nothing_say_so() -> None:
    options = {NetworkOptions: NetworkOptions(network_name_filter="*nothing*")}
    with pytest.raises(AdapterError, match=r"network_name_filter \*nothing\* excludes all"):
        network(layers(), AdapterSpec("lierla", rank=4, alpha=3.0, options=options))
    assert name_chosen("", ("a",)) and name_chosen("!b*", ("a",)) and not name_chosen("a*;!*b", ("ab", "x"))


# -- starts that are not zero ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name in TYPES if "pissa" in ADAPTERS.get(name).inits])
def test_a_counted_start_is_the_bare_model_and_its_file_twice_the_rank(kind: str) -> None:
    net = network(layers(), spec(kind, network_init="pissa"))
    generator = torch.Generator().manual_seed(2)
    for adapter in net:
        adapter.start(
            torch.randn(adapter.down.shape, generator=generator).flatten(1),
            torch.randn(adapter.up.shape, generator=generator),
        )
        assert adapter.up.abs().sum() > 0 and adapter.delta().abs().max() < 1e-5
    began = {a.key: (a.up.detach() @ a.down.detach().flatten(1)).clone() for a in net}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    values = torch.tensor([-1.0, 0.5, 0.0])
    with net.attached(), net.at_strength(values):
        for adapter in net:
            delta = adapter.scale * (adapter.up @ adapter.down.flatten(1) - began[adapter.key])
            torch.testing.assert_close(adapter.delta().flatten(1), delta, rtol=1e-4, atol=1e-4)
            x = input_of(adapter.module)
            y = adapter.module(x)
            for row, value in enumerate(values.tolist()):
                torch.testing.assert_close(
                    y[row : row + 1], expected(adapter, x[row : row + 1], value), rtol=1e-3, atol=1e-4
                )
    reader = network(layers(), AdapterSpec(kind, rank=8, alpha=1.0, conv_rank=4, conv_alpha=2.0))
    report = reader.load(net.export(torch.float32, 2.0))
    assert report.matched == len(net) and not report.unmatched
    for one, two in zip(net, reader, strict=True):
        torch.testing.assert_close(two.delta(), 2 * one.delta(), rtol=1e-4, atol=1e-4)
    again = network(layers(), spec(kind, network_init="pissa"), seed=8)
    again.load_state_dict(net.state_dict())
    assert all(torch.equal(one.delta(), two.delta()) for one, two in zip(net, again, strict=True))


def test_dropout_of_a_counted_start_draws_both_sides_alike() -> None:
    """With all that was learned taken away again, the step is the bare model whatever is dropped."""
    net = network(layers(), spec(network_init="olora", network_dropout=0.5, network_rank_dropout=0.5))
    bare = {a.key: a.module(input_of(a.module)) for a in net}
    for adapter in net:
        adapter.start(torch.randn(adapter.down.shape).flatten(1), torch.randn(adapter.up.shape))
    for key, y in outputs(net).items():
        torch.testing.assert_close(y, bare[key], rtol=1e-4, atol=1e-4)


def test_tags_follow_from_what_a_type_is_made_of() -> None:
    class Odd(Adapter):
        ranked, droppable, needs = False, False, frozenset({"own"})

    assert Odd.tags() == {"own"}
    assert {"rank", "dropout", "max_norm", "loraplus", "freeze_down", "init"} <= ADAPTERS.get("lierla").tags()


def test_a_type_that_leaves_something_open_is_refused_with_its_names() -> None:
    class Halved(Adapter):
        @classmethod
        def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
            return True

        def delta(self) -> torch.Tensor:
            return torch.zeros(())

    class Kept(Stage):
        help = "asks for nothing"

    with pytest.raises(TypeError, match=r"network_type 'halved': .*Halved must define read, rescaled, tensors before"):
        ADAPTERS.register("halved")(Halved)
    with pytest.raises(TypeError, match=r"stage 'kept': .*Kept must define wanted before"):
        STAGES.register("kept")(Kept)
    assert "halved" not in ADAPTERS.names() and "kept" not in STAGES.names()
    with pytest.raises(TypeError, match="abstract.*rescaled"):
        Halved(layers()[0], spec(), Strength(), torch.Generator())  # type: ignore[abstract]
