"""Precision: stored weights are cast per call, exactly as a cast model computes, and no cast copy waits for the
backward pass."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from trainer.models import precision

HALVES = (torch.float16, torch.bfloat16)


def layers():
    torch.manual_seed(0)
    return [
        (nn.Linear(6, 5), torch.randn(2, 3, 6)),
        (nn.Linear(6, 5, bias=False), torch.randn(4, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 1, groups=2, bias=False), torch.randn(2, 4, 5, 5)),
        (nn.GroupNorm(2, 4), torch.randn(2, 4, 5, 5)),
        (nn.LayerNorm(6), torch.randn(2, 6)),
        (nn.Embedding(7, 3), torch.tensor([[1, 6], [0, 3]])),
    ]


@pytest.mark.parametrize("dtype", HALVES)
def test_each_layer_computes_and_differentiates_as_its_float32_copy(dtype):
    for stored, x in layers():
        stored.to(dtype)
        plain = copy.deepcopy(stored).float()
        assert precision.install(stored, torch.float32) == 1
        results = []
        for module in (stored, plain):
            given = x.clone().requires_grad_(x.is_floating_point())
            y = module(given)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append((y, given.grad, *(p.grad.float() for p in module.parameters())))
        assert stored.weight.dtype == dtype == stored.weight.grad.dtype
        for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
            if theirs is not None:
                tight = dict(atol=1e-5, rtol=1e-5) if number < 2 else dict(atol=3e-2, rtol=2e-2)
                torch.testing.assert_close(ours, theirs, **tight)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_half_storage_predicts_as_the_cast_model(kind):
    half, cast = tiny.model(kind, dtype=torch.float16), tiny.model(kind, dtype=torch.float16)
    cast.set_precision(storage=torch.float32)
    assert half.storage == torch.float16 and cast.storage == torch.float32
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = half.time_ids((64, 64), (0, 0), (64, 64))
    ids = None if ids is None else ids[None]
    outs = [m.predict(x, torch.tensor([50]), m.encode_prompts(["ring"]), ids) for m in (half, cast)]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    assert outs[0].dtype == torch.float32


def test_float32_storage_keeps_the_plain_modules():
    model = tiny.model("sd1")
    parts = [module for part in (model.unet, *model.text_encoders) for module in part.modules()]
    assert not any("forward" in module.__dict__ for module in parts)
    model.set_precision(storage=torch.bfloat16)
    assert any("forward" in module.__dict__ for module in parts)
    model.set_precision(storage=torch.bfloat16, compute=torch.bfloat16)
    assert not any("forward" in module.__dict__ for module in parts) and model.compute == torch.bfloat16
    model.set_precision(storage=torch.float32)
    assert not any("forward" in module.__dict__ for module in parts) and model.compute == torch.float32


def test_no_cast_copy_of_a_weight_is_kept_for_the_backward_pass():
    model = tiny.model("sd1", dtype=torch.float16)
    cond = model.encode_prompts(["a"])
    weights = {p.untyped_storage().data_ptr() for p in model.unet.parameters()}
    shapes = {p.shape for p in model.unet.parameters() if p.dim() >= 2} | {
        p.T.shape for p in model.unet.parameters() if p.dim() == 2
    }
    kept = []
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model.predict(x, torch.tensor([5]), cond)
    assert any(tensor.untyped_storage().data_ptr() in weights for tensor in kept)
    copies = [t.shape for t in kept if t.shape in shapes and t.untyped_storage().data_ptr() not in weights]
    assert not copies
    out.sum().backward()
    assert x.grad.abs().sum() > 0


def test_another_forward_can_wrap_the_casting_one():
    """As an adapter does: keep module.forward, put its own in its place, take it out again."""
    layer = nn.Linear(4, 4).half()
    precision.install(layer, torch.float32)
    x, base = torch.randn(2, 4), layer.forward
    before = layer(x)
    layer.forward = lambda given: base(given) + 1
    torch.testing.assert_close(layer(x), before + 1)
    layer.forward = base
    assert torch.equal(layer(x), before)
    precision.install(layer.float(), torch.float32)
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_checkpointing_changes_nothing_but_memory(dtype):
    model = tiny.model("sdxl", dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    x, ids = torch.randn(1, 4, 8, 8, generator=rng), model.time_ids((64, 64), (0, 0), (64, 64))[None]
    text = model.text_encoders[0].transformer.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    kept, results = [], []
    for on in (False, True, False):
        model.set_gradient_checkpointing(on)
        given, count = x.clone().requires_grad_(True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(t.numel()) or t, lambda t: t):
            out = model.predict(given, torch.tensor([9]), model.encode_prompts(["a"]), ids)
        text.grad = None
        out.square().mean().backward()
        results.append((out.detach(), given.grad, text.grad.clone()))
        kept.append(sum(count))
    for plain, checkpointed, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
        assert torch.equal(plain, again)
    assert kept[1] < 0.5 * kept[0] and kept[2] == kept[0]


def test_compute_precision_by_device():
    assert precision.compute_dtype("cpu", torch.float16) == torch.float32
    assert precision.compute_dtype("cuda", torch.float16) == torch.float16


def test_eight_bit_floats_are_widened():
    model = tiny.model("sd1", tensors={n: t.to(torch.float8_e4m3fn) for n, t in tiny.checkpoint("sd1").items()})
    assert model.storage == torch.float16
