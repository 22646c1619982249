"""Whole runs on a card with the tiny model: precisions, waiting, resuming, overflows, memory, hosts, switches."""

from __future__ import annotations

import importlib.util
import math
import threading
import warnings

import engine_case
import gpu_case
import hosts_case
import pair_case
import pytest
import torch
from gpu_case import CUDA, FEW, ILECO, MIB, session, settled, train
from torch_switches import switches

from trainer.engine import loop
from trainer.engine.control import Control
from trainer.engine.devices import SpillWatch, settle
from trainer.engine.run import Request, run
from trainer.errors import DivergedError
from trainer.events import EventLog, Note, Step
from trainer.models.load import load_model
from trainer.optim.optimizers import OPTIMIZERS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_estimate")]

HAVE = [
    name for name, traits in OPTIMIZERS.items() if importlib.util.find_spec(traits.package) is not None
]  # the eight of bitsandbytes too, where it is installed
MODES = ["LoRA", "iLECO", "ADDifT", "Multi-ADDifT", "Difference"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pair_case.make(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def case(pairs):
    return engine_case.Case(pairs.root, pairs.model, pairs.pictures)


@pytest.mark.parametrize("lora", gpu_case.DTYPES)
@pytest.mark.parametrize("model", gpu_case.DTYPES)
def test_every_pair_of_precisions_trains(case, model, lora):
    trace = engine_case.Trace()
    train(case, trace, save_lora_name="pair", train_model_precision=model, train_lora_precision=lora,
          train_iterations=3)  # fmt: skip
    assert len(trace.losses) == 3 and all(map(math.isfinite, trace.losses.values()))


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts copies from main memory to the card: from memory that is not pinned each of them waits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and tensors:
            Copies.count += tensors[-1].device.type == "cpu" and out.device.type == "cuda"
        return out


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_but_for_its_batch(case, pairs, mode, precision):
    """Between two readings nothing is read from the card; what is sent to it are batch, noise and timesteps."""
    which = case if mode in ("LoRA", "iLECO") else pairs
    changes = {**FEW, **(ILECO if mode == "iLECO" else {}), "mode": mode, "train_model_precision": precision}
    if mode == "Difference":
        changes["diff_1st_pass_only"] = True
    model = load_model(case.model, device=CUDA, storage=gpu_case.DTYPES[precision])
    made = engine_case.session(which, which.job(**changes, train_iterations=10, save_lora_name="waits"), model)
    try:
        for _ in range(2):
            loop.optimizer_step(made, None)
        Copies.count = 0
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught, Copies():
            warnings.simplefilter("always")
            for _ in range(3):
                loop.optimizer_step(made, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        made.network.eject()
    waits = [warning for warning in caught if "synchroniz" in str(warning.message).lower()]
    assert len(waits) <= Copies.count <= 3 * 24, [str(warning.message) for warning in waits[:3]]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", HAVE)
def test_every_optimizer_resumes_bit_for_bit(case, name, precision):
    """Six steps against three and three, with cuDNN's deterministic algorithms: a card's fastest ones are not."""
    rate = 1.0 if OPTIMIZERS.get(name).wants_lr_one else 1e-3
    changes = {
        "train_optimizer": name, "train_learning_rate": rate, "train_model_precision": precision,
        "train_iterations": 6, "train_state_every": 3, "save_lora_name": f"resumed-{name}",
    }  # fmt: skip
    whole, parts, control = engine_case.Trace(), engine_case.Trace(), Control()

    def stop(event):
        if isinstance(event, Step) and event.step == 3:
            control.stop()

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(case, whole, **changes)
        job = case.job(**{**FEW, **changes})
        stopped = run(Request(job, case.places, device=CUDA), EventLog(parts, stop), control)
        run(Request(job, case.places, device=CUDA, resume=stopped.folder), EventLog(parts))
    finally:
        torch.use_deterministic_algorithms(before)
    assert parts.losses == whole.losses and sorted(whole.losses) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_learns_nothing_ends_with_advice(case, monkeypatch):
    original = loop.gradients

    def overflowing(made, step):
        loss = original(made, step)
        made.flat.gradients[0][3] = math.inf
        return loss

    monkeypatch.setattr(loop, "gradients", overflowing)
    trace = engine_case.Trace()
    with pytest.raises(DivergedError, match=r"fp16.*train_model_precision.*fp32"):
        train(case, trace, train_model_precision="fp16", save_lora_name="idle", train_iterations=60)
    assert max(trace.losses) < 30


def test_a_clean_fp16_run_skips_few_steps_and_says_its_scale(case):
    trace = engine_case.Trace()
    train(case, trace, train_model_precision="fp16", save_lora_name="clean", train_iterations=30)
    assert [event.skipped for event in trace.events if isinstance(event, Step)][-1] <= 5


def test_memory_returns_after_each_run(case):
    """Three runs in one process: what is allocated and reserved after each is the same."""
    after = []
    for _ in range(3):
        train(case, train_model_precision="fp16", save_lora_name="again", train_iterations=2, sample_every=2,
              sample_prompts="a circle", sample_steps=2)  # fmt: skip
        after.append(settled())
    assert after[1] == after[2] and after[2][1] <= after[0][1] + 64 * MIB


@pytest.mark.parametrize("kind", hosts_case.CLASSES)
def test_every_host_lends_its_model_to_the_card(tmp_path, monkeypatch, kind):
    _, host = hosts_case.starter(tmp_path, monkeypatch)(kind)
    monkeypatch.setattr(type(host), "draws_on", lambda self: CUDA)
    before, _ = settled()
    told = hosts_case.Told()
    with host.borrow(host.resolve(hosts_case.job()), told.log) as model:
        assert model is not None, told.lines
        assert model.device == CUDA
        settle(model, model.unet)
        size = sum(p.numel() * p.element_size() for p in model.unet.parameters())
        assert {p.device for p in model.unet.parameters()} == {CUDA}
        assert settled()[0] - before < 1.05 * size + MIB
        del model
    assert settled()[0] - before < MIB


def test_switches_are_as_before_after_a_run_and_after_an_error(case, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    before, seen = switches(), []
    original = loop.optimizer_step

    def look(made, plateau):
        seen.append(switches())
        return original(made, plateau)

    monkeypatch.setattr(loop, "optimizer_step", look)
    train(case, save_lora_name="switches", train_iterations=1)
    assert seen[0]["tf32"] == "tf32" and not seen[0]["fp16 sums"] and switches() == before

    def broken(made, step):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "gradients", broken)
    with pytest.raises(ZeroDivisionError):
        train(case, save_lora_name="switches", train_iterations=1)
    assert switches() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_thread_trains_on_the_card_it_was_given(case):
    """The queue's thread begins on card 0, whatever the host chose."""
    second, trace, found = torch.device("cuda", 1), engine_case.Trace(), []

    def work():
        found.append(torch.cuda.current_device())
        train(case, trace, device=second, save_lora_name="second", train_iterations=2)
        found.append(torch.cuda.current_device())

    before = torch.cuda.max_memory_allocated(0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(trace.losses) == 2 and found == [0, 0]
    assert torch.cuda.max_memory_allocated(1) > MIB and torch.cuda.max_memory_allocated(0) == before


def test_a_full_card_is_warned_of_once(monkeypatch):
    total = torch.cuda.mem_get_info(CUDA)[1]
    notes = []
    log = EventLog(lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    watch = SpillWatch(CUDA, log)
    step = Step(step=1, total=2, loss=0.1, loss_ema=0.1, rates=(1e-4,), images_per_second=1.0, seconds_left=1.0)
    watch(step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (total // 100, total))
    watch(step)
    watch(step)
    assert len(notes) == 1 and "use_gradient_checkpointing" in notes[0]


def test_an_interrupted_step_leaves_the_session_usable(case):
    """A session made directly, on the card, in half precision: two steps and the exact values for a file."""
    model = load_model(case.model, device=CUDA, storage=torch.float16)
    made = session(case, model, train_lora_precision="fp16", save_lora_name="half")
    try:
        assert all(math.isfinite(float(loop.optimizer_step(made, None))) for _ in range(2))
        with made.evaluating():
            assert {p.dtype for p in made.network.parameters()} == {torch.float32}
        assert {p.dtype for p in made.network.parameters()} == {torch.float16}
    finally:
        made.network.eject()
