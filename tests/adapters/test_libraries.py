"""Our files in the modules of LyCORIS and PEFT: their forward gives what ours gave in training.

Not asked of LyCORIS 4.1.3, because it cannot read these files itself: IA3 (its reload passes one argument too many),
GLoRA (it knows only its newer layout), LoKr with Tucker cores (it takes the rank from the wrong axis), EH in four
groups (it guesses a factor), and DoRA by inputs (its reload always makes one by outputs; here it is made by hand).
"""

from __future__ import annotations

import logging

import pytest
import torch
from adapter_layers import input_of, layers
from adapter_specs import SPECS, trained
from torch import Tensor

from trainer.adapters.boft import butterfly_sizes
from trainer.adapters.library import functional
from trainer.adapters.lokr import factor_pair
from trainer.contracts import Layer
from trainer.maths.rotation import butterfly, cayley_minus_identity

UNREADABLE = ("ia3", "glora", "lokr tucker", "eh")
READABLE = [name for name in SPECS if name not in UNREADABLE]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def by_inputs(record: Layer, kind: type, tensors: tuple[Tensor | None, ...]):
    """A LyCORIS module with its lengths along the other axis than its own reload makes."""
    found = {name: tensor for name, tensor in zip(kind.weight_list, tensors, strict=True) if tensor is not None}
    rank = next(len(found[name]) for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1") if name in found)
    given = {"lora_dim": rank, "alpha": float(found["alpha"]), "weight_decompose": True, "wd_on_out": False}
    module = kind(record.key, record.module, 1.0, **given, full_matrix="lokr_w2" in found)
    assert set(found) == set(module.state_dict())
    module.load_state_dict({name: tensor for name, tensor in found.items()})
    return module


@pytest.mark.parametrize("name", READABLE)
def test_a_lycoris_network_does_what_was_trained(name: str) -> None:
    from lycoris.modules import get_module, make_module

    net = trained(SPECS[name])
    file = net.export(torch.float32)
    with net.attached():
        wanted = {adapter.key: adapter.module(input_of(adapter.module)).detach() for adapter in net}
    for record in layers():
        if record.key not in wanted:
            continue
        kind, tensors = get_module(file, record.key)
        lengths = file.get(f"{record.key}.dora_scale")
        if lengths is not None and lengths.shape[0] == 1:
            module = by_inputs(record, kind, tensors)
        else:
            module = make_module(kind, tensors, record.key, record.module)
        module.eval()
        module.apply_to()
        got = record.module(input_of(record.module))
        torch.testing.assert_close(got, wanted[record.key], rtol=2e-5, atol=2e-5, msg=f"{name} {record.key}")


def test_dora_by_outputs_is_pefts() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    net = trained(SPECS["lierla dora output"])
    file = net.export(torch.float32)
    with net.attached():
        wanted = {adapter.key: adapter.module(input_of(adapter.module)).detach() for adapter in net}
    for record in layers():
        if record.key not in wanted or record.kind != "linear":
            continue
        own = {name[len(record.key) + 1 :]: tensor for name, tensor in file.items() if name.startswith(record.key)}
        config = LoraConfig(r=4, lora_alpha=float(own["alpha"]), use_dora=True, target_modules=["layer"])
        model = inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": record.module}))
        state = {
            "lora_A": own["lora_down.weight"],
            "lora_B": own["lora_up.weight"],
            "lora_magnitude_vector": own["dora_scale"].flatten(),
        }
        for name, parameter in model.named_parameters():
            given = next((tensor for word, tensor in state.items() if word in name), None)
            if given is not None:
                parameter.data.copy_(given)
        torch.testing.assert_close(model["layer"](input_of(record.module)), wanted[record.key], rtol=2e-5, atol=2e-5)


def test_a_file_of_lycoris_newer_glora_is_read() -> None:
    """ΔW = (W·a1·a2 + b1·b2)·alpha/rank in its newer layout."""
    from lycoris.modules.glora import GLoRAModule

    net = trained(SPECS["glora"])
    file, wanted = {}, {}
    for record in layers():
        if record.key not in net.adapters:
            continue
        module = GLoRAModule(record.key, record.module, 1.0, lora_dim=4, alpha=6.0)
        for number, parameter in enumerate(module.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        file.update({f"{record.key}.{name}": t.detach() for name, t in module.custom_state_dict().items()})
        wanted[record.key] = module.get_diff_weight()[0].detach()
    net.load(file)
    for adapter in net:
        torch.testing.assert_close(adapter.delta(), wanted[adapter.key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [-1, 1, 2, 3, 4, 5, 8, 12, 16, 64])
def test_the_factors_of_lokr_are_lycoris(limit: int) -> None:
    from lycoris.functional import factorization

    sizes = (*range(1, 130), 250, 320, 360, 512, 640, 768, 1024, 1280, 2048, 2560, 5120, 10240)
    assert {size: factor_pair(size, limit) for size in sizes} == {size: factorization(size, limit) for size in sizes}


def test_the_group_sizes_of_boft_are_lycoris() -> None:
    from lycoris.functional import power2factorization

    for size in (8, 10, 12, 96, 320, 640, 768, 1024, 1280, 2560, 3072, 5120, 10240):
        for limit in (2, 4, 8, 10, 12, 16, 64):
            theirs = power2factorization(size, limit)
            assert butterfly_sizes(size, limit) == (None if theirs[0] is None else theirs)


def test_the_stages_of_boft_are_lycoris_and_their_gradients_right() -> None:
    """Eight groups of twelve, so that four stages follow one another."""
    from lycoris.functional.boft import diff_weight

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 8, 12, 12, generator=generator) * 0.1
    outputs = torch.randn(96, 5, generator=generator)
    turned = butterfly(outputs, cayley_minus_identity(blocks))
    torch.testing.assert_close(turned - outputs, diff_weight(outputs, blocks, None, backend="torch"))
    shapes = ((8, 3), (3, 4, 2, 2))
    small, turns = (torch.randn(*shape, generator=generator).double().requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(butterfly, (small, turns))


@pytest.mark.parametrize("name", [name for name in SPECS if name.split()[0] in ("loha", "lokr", "oft", "boft")])
def test_an_old_torch_gets_the_same_update_without_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS 4.1 cannot be imported with the torch that AUTOMATIC1111 (2.1) and Forge (2.3) pin."""
    net = trained(SPECS[name])
    wanted = [adapter.delta().detach() for adapter in net]

    def too_old(module: str) -> None:
        raise AttributeError("module 'torch.library' has no attribute 'custom_op'")

    monkeypatch.setattr("importlib.import_module", too_old)
    functional.cache_clear()
    try:
        for adapter, delta in zip(net, wanted, strict=True):
            got = adapter.delta()
            torch.testing.assert_close(got, delta, rtol=1e-5, atol=1e-6)
            got.square().sum().backward()
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    finally:
        functional.cache_clear()
