"""torch's switches around a run, and what a card can do, with torch.cuda faked: no card is needed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import engine_case
import pytest
import torch
from torch_switches import switches

from trainer.cli.draw import Easel
from trainer.engine import flags, loop
from trainer.engine.flags import bf16_warning, is_gtx_16, native_bf16, training_flags
from trainer.engine.process import Process, this_process
from trainer.engine.run import Request, run
from trainer.errors import JobError
from trainer.events import EventLog
from trainer.params.core import Task
from trainer.tools import curvature
from trainer.ui.wish import Wish

CARDS = {  # name, compute capability
    "NVIDIA GeForce GTX 1080": (6, 1), "NVIDIA GeForce GTX 1650": (7, 5), "NVIDIA GeForce GTX 1660 SUPER": (7, 5),
    "NVIDIA GeForce RTX 2060": (7, 5), "Tesla T4": (7, 5), "NVIDIA GeForce RTX 3060": (8, 6),
    "NVIDIA GeForce RTX 4090": (8, 9),
}  # fmt: skip
DEVICE = torch.device("cuda", 1)


@pytest.fixture
def card(monkeypatch):
    """Fake a card by its name; the list says which device was made the current one."""
    current = []

    def made_current(device):
        current.append(device)
        return contextlib.nullcontext()

    def take(name, old=False):
        capability = CARDS[name]

        def supported(**asked):
            if old and asked:
                raise TypeError("is_bf16_supported() got an unexpected keyword argument 'including_emulation'")
            return capability >= (8, 0) or asked.get("including_emulation", True)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", made_current)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        return current

    return take


@pytest.fixture
def as_a_host_left_them():
    """Switches as Forge Neo --fast-fp16 and an extension may have them; afterwards those of the test run."""
    cuda, before = torch.backends.cuda, switches()
    cuda.matmul.allow_tf32, cuda.matmul.allow_fp16_accumulation = False, True
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    yield switches()
    cuda.matmul.allow_tf32 = before["tf32"] == "tf32"
    cuda.matmul.allow_fp16_accumulation = before["fp16 sums"]
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before["cudnn tf32"], before["benchmark"]
    cuda.allow_fp16_bf16_reduction_math_sdp(before["math sums"])
    cuda.enable_flash_sdp(before["flash"])
    cuda.enable_mem_efficient_sdp(before["efficient"])


@pytest.mark.newest
@pytest.mark.parametrize("name", CARDS)
def test_switches_are_right_in_a_run_and_as_before_after_it(card, as_a_host_left_them, name):
    current = card(name)
    wanted = {
        "tf32": "tf32", "fp16 sums": False, "cudnn tf32": True, "benchmark": "GTX 16" in name, "math sums": False,
        "flash": True, "efficient": True, "math": True,
    }  # fmt: skip
    with training_flags(DEVICE):
        assert switches() == wanted and current == [DEVICE]
    assert switches() == as_a_host_left_them
    with pytest.raises(KeyError), training_flags(DEVICE):
        raise KeyError
    assert switches() == as_a_host_left_them
    for other in ("cpu", "mps"):
        with training_flags(torch.device(other)):
            assert switches() == as_a_host_left_them


@pytest.mark.newest
def test_switches_set_by_the_names_of_newer_torch_are_restored(card):
    """After these, asking for allow_tf32 is an error in torch 2.9 and above."""
    card("NVIDIA GeForce RTX 3060")
    matmul = torch.backends.cuda.matmul
    legacy = matmul.allow_tf32
    try:
        matmul.fp32_precision = "ieee" if legacy else "tf32"
        with pytest.raises(RuntimeError):
            _ = matmul.allow_tf32
        before = switches()
        with training_flags(DEVICE):
            assert matmul.fp32_precision == "tf32"
        assert switches() == before
    finally:
        matmul.allow_tf32 = legacy


def test_a_torch_that_lacks_a_switch_keeps_the_others(card, monkeypatch):
    """torch 2.1 has neither fp16 accumulation nor a switch for the sums of attention."""
    card("NVIDIA GeForce RTX 3060")

    class Matmul:
        allow_tf32 = False

        def __getattr__(self, name):
            raise AttributeError(f"Unknown attribute {name}")

    old = SimpleNamespace(matmul=Matmul(), flash_sdp_enabled=lambda: True, enable_flash_sdp=lambda on: None)
    monkeypatch.setattr(torch.backends, "cuda", old)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=True, benchmark=True))
    with training_flags(DEVICE):
        assert old.matmul.allow_tf32 is True and torch.backends.cudnn.benchmark is False
        assert not hasattr(old.matmul, "allow_fp16_accumulation")
    assert old.matmul.allow_tf32 is False and torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CARDS)
def test_cards_that_emulate_bf16_are_known(card, name, old):
    card(name, old)
    native = CARDS[name] >= (8, 0)
    assert native_bf16(DEVICE) is native and native_bf16(torch.device("cpu"))
    warning = bf16_warning(DEVICE, torch.bfloat16)
    assert (name in warning and "train_model_precision to fp16" in warning) is not native
    assert not bf16_warning(DEVICE, torch.float16)
    assert is_gtx_16(DEVICE) is ("GTX 16" in name)


@pytest.mark.parametrize(("name", "advice"), [("NVIDIA GeForce RTX 2060", "fp32"), ("Tesla T4", "fp32"),
                                              ("NVIDIA GeForce RTX 4090", "bf16 or fp32")])  # fmt: skip
def test_nobody_is_sent_to_bf16_on_a_card_that_emulates_it(card, name, advice):
    card(name)
    model = SimpleNamespace(device=DEVICE, compute=torch.float16)
    session = SimpleNamespace(model=model, flat=SimpleNamespace(values=[torch.zeros(1)]))
    assert loop.wider_precision(session) == f"train with train_model_precision {advice}"


def test_the_device_of_the_host_is_the_one_that_is_trained_on(card, monkeypatch):
    """In a thread of its own the current device is 0 again, whatever the program chose."""
    card("NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Process().device() == torch.device("cuda", 0)
    assert this_process(DEVICE).device() == DEVICE


def test_every_run_goes_through_the_switches(tmp_path, monkeypatch):
    """Also one that fails: whoever runs a job (command line, queue, host) runs it by this one function."""
    case, seen = engine_case.make(tmp_path), []

    @contextlib.contextmanager
    def watched(device):
        seen.append(device)
        try:
            yield
        finally:
            seen.append("restored")

    monkeypatch.setattr("trainer.engine.run.training_flags", watched)
    with pytest.raises(JobError):
        run(Request(case.job(model="nowhere"), case.places, device=torch.device("cpu")), EventLog())
    assert seen == [torch.device("cpu"), "restored"]
    assert flags.training_flags is not watched


def test_our_own_pictures_and_curvature_are_computed_with_the_same_switches(tmp_path, monkeypatch):
    case, seen = engine_case.make(tmp_path), []

    @contextlib.contextmanager
    def watched(device):
        seen.append(device)
        yield

    monkeypatch.setattr("trainer.cli.draw.training_flags", watched)
    monkeypatch.setattr("trainer.tools.curvature.training_flags", watched)
    wish = Wish(prompt="a circle", model=str(case.model), size=(64, 64), steps=1)
    Easel().draw(wish, None, case.job()[Task], torch.device("cpu"))
    curvature.make_curvature(case.job(data_cache="memory"), case.places, tmp_path / "curvature.safetensors", count=1)
    assert seen == [torch.device("cpu")] * 2
