"""Running out of memory: every phase says so in its own words, holds nothing afterwards, and the next run succeeds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import engine_case
import hosts_case
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.cli.worker import Bench
from trainer.engine import build, keeping, preview, run, shortage
from trainer.engine.control import Control
from trainer.engine.state import STATE_FILE
from trainer.errors import MemoryShortageError, ModelError
from trainer.events import EventLog, Finished, Note, Sampled
from trainer.hosts import webui
from trainer.hosts.standalone import Standalone
from trainer.jobs.entry import Entry
from trainer.models import room
from trainer.ui.wish import Wish

pytestmark = pytest.mark.usefixtures("no_estimate")

TOLD = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 12.19 MiB is free."
)


class Full(TorchDispatchMode):
    """An allocator with nothing left: the first operation ends as it does on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            raise torch.cuda.OutOfMemoryError(TOLD)
        return result


@contextmanager
def nothing_left_while(name: str) -> Iterator[None]:
    """Memory runs out as soon as the phase of that name allocates anything."""
    inside: list[str] = []

    @contextmanager
    def watched(phase: str, *facts) -> Iterator[None]:
        inside.append(phase)
        try:
            with shortage.phase(phase, *facts), Full() if phase == name != shortage.LOADING else nullcontext():
                yield
        finally:
            inside.pop()

    def unread(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError(TOLD)

    with pytest.MonkeyPatch.context() as patch:
        if name == shortage.LOADING:  # safetensors makes its tensors outside of torch's operations
            patch.setattr(run, "load_model", unread)
        for module in (run, build, keeping, preview):
            patch.setattr(module, "phase", watched)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("shortage"))


LINES = {
    shortage.LOADING: "train_model_precision to bf16 or fp16 (now fp32)",
    shortage.ADAPTER: "Close other programs.",
    shortage.IMAGES: "train_VAE_precision to bf16 (now fp32)",
    shortage.TEXTS: "train_model_precision to bf16 or fp16 (now fp32)",
    shortage.TRAINING: "Switch use_gradient_checkpointing on; or lower train_batch_size (now 2) and raise "
    "train_gradient_accumulation (now 1) instead; or set train_model_precision",
    shortage.SAVING: "Close other programs.",
}


@pytest.mark.parametrize("name", LINES)
def test_a_phase_that_runs_out_says_so_and_the_next_run_succeeds(case, name) -> None:
    told: list[Finished] = []
    settings = {"train_iterations": 1, "network_targets": "unet", "data_cache": "memory", "save_overwrite": True}

    def finished(event) -> None:
        if isinstance(event, Finished):
            told.append(event)

    with nothing_left_while(name), pytest.raises(MemoryShortageError) as caught:
        case.run(finished, **settings)
    text = str(caught.value)
    assert f"ran out while {name} (about " in text and "GiB are needed, " in text and "GiB are free" in text
    assert LINES[name] in text and "Traceback" not in text
    assert [(event.reason, event.error) for event in told] == [("failed", text)]
    if name == shortage.TRAINING:  # what was learned until then is kept
        assert text.endswith("The state after step 0 is kept: resume the run.")
        (state,) = case.places.logs.rglob(STATE_FILE)
        assert case.run(**settings, resume=state.parent).reason == "done"
    assert case.run(**settings).reason == "done"


def test_a_preview_that_does_not_fit_is_left_out_with_a_warning(case) -> None:
    notes, pictures = [], []

    def listen(event) -> None:
        notes.extend([event] if isinstance(event, Note) and event.level == "warning" else [])
        pictures.extend([event] if isinstance(event, Sampled) else [])

    settings = {"train_iterations": 2, "sample_every": 1, "sample_prompts": "a red circle", "sample_steps": 1}
    with nothing_left_while(shortage.PREVIEW):
        result = case.run(listen, **settings, save_lora_name="pictureless")
    assert result.reason == "done" and result.path.is_file() and not pictures
    assert "at step 1. The training continues. " in notes[0].text and notes[1].text.endswith("2. Memory ran out again.")
    assert "train_VAE_precision" in notes[0].text and "sample_every 0 (now 1)" in notes[0].text


def test_only_settings_that_this_job_can_change_are_named(case) -> None:
    cuda = torch.device("cuda")
    lean = case.job(
        use_gradient_checkpointing=True, train_batch_size=1, train_model_precision="bf16", network_targets="unet",
        train_optimizer="AdaFactor", train_VAE_precision="bf16",
    )  # fmt: skip
    assert shortage.helps(shortage.TRAINING, lean, cuda) == ["close other programs that use the GPU"]
    assert shortage.helps(shortage.IMAGES, lean, cuda) == ["close other programs that use the GPU"]
    rich = case.job(
        prior_loss_weight=1.0, prior_batch_size=4, train_optimizer="Lion", network_rank=32, network_type="full"
    )
    said = "; ".join(shortage.helps(shortage.TRAINING, rich, cuda))
    for part in ("prior_batch_size (now 4)", "Lion8bit (now Lion)", "network_rank (now 32)", "network_type lierla",
                 "network_targets unet (now both)"):  # fmt: skip
        assert part in said
    assert "8bit" not in "; ".join(shortage.helps(shortage.TRAINING, rich, torch.device("cpu")))


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.cuda.OutOfMemoryError(TOLD), 2.5 * 2**30),
        (MemoryError(), None),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.57 GB, max allowed: 9.07 GB). Tried to allocate "
                      "256.00 MB on private pool."), 256 * 2**20),
        (RuntimeError("Invalid buffer size: 24.00 GiB"), 24 * 2**30),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 1073741824 bytes. Error code 12"), 2**30),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (OSError(1455, "The paging file is too small for this operation to complete"), None),
    ],
)  # fmt: skip
def test_each_way_of_saying_it_is_understood(error, asked) -> None:
    assert room.is_shortage(error) and shortage.asked_bytes(error) == asked
    with pytest.raises(MemoryShortageError), shortage.phase(shortage.TRAINING, torch.device("cpu")):
        raise error
    reader = ModelError("the file cannot be read")
    reader.__cause__ = error
    with (
        pytest.raises(MemoryShortageError) as caught,
        shortage.phase(shortage.LOADING, torch.device("cuda"), None, lambda: 7 * 2**30),
    ):
        raise reader
    if isinstance(error, (MemoryError, OSError)) or "CPU" in str(error):
        assert "Main memory ran out while loading the model (about 7.0 GiB are needed, " in str(caught.value)
    else:
        assert "The memory of cuda ran out" in str(caught.value)


def test_a_figure_that_cannot_be_worked_out_hides_nothing() -> None:
    def needed() -> int:
        raise KeyError("training")

    with (
        pytest.raises(MemoryShortageError, match=r"The memory of cuda ran out while training \(about 2.5 GiB"),
        shortage.phase(shortage.TRAINING, torch.device("cuda"), None, needed),
    ):
        raise torch.cuda.OutOfMemoryError(TOLD)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(28, "No space left on device"), ModelError()])
def test_other_errors_stay_what_they_are(error) -> None:
    with pytest.raises(type(error)) as caught, shortage.phase(shortage.TRAINING, torch.device("cpu")):
        raise error
    assert caught.value is error


# -------------------------------------------------------------------- who gets the device back, and when


@pytest.fixture
def make(tmp_path, monkeypatch):
    return hosts_case.starter(tmp_path, monkeypatch)


@pytest.mark.parametrize(("kind", "ending"), [("a1111", "done"), ("neo", "short"), ("a1111", "defect")])
def test_nothing_of_the_training_is_left_when_the_webui_takes_its_models_back(
    case, kind, ending, make, monkeypatch
) -> None:
    _, host = make(kind)
    order: list[str] = []
    models: list[weakref.ref] = []
    adopt = webui.adopt

    def adopted(*args, **kwargs):
        model = adopt(*args, **kwargs)
        models.extend(weakref.ref(part) for part in (model, *model.parts))
        return model

    def back(*_) -> None:
        order.append("dead" if models and not any(ref() for ref in models) else "alive")

    real, lay_bare = webui.give_back, host.lay_bare

    def given() -> None:
        back()
        real()

    def bare(restore):
        restore.callback(order.append, "their models return")
        return lay_bare(restore)

    monkeypatch.setattr(webui, "adopt", adopted)
    monkeypatch.setattr(webui, "give_back", given)
    monkeypatch.setattr(host, "lay_bare", bare)
    settings = case.settings(model="", train_iterations=1, network_targets="unet", data_cache="memory")
    entry = Entry(id="a", job={**settings, "train_model_precision": "model", "train_VAE_precision": "model"})
    bench = Bench(host)
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        if ending == "done":
            assert bench.run(entry, EventLog(), Control()).reason == "done"
        elif ending == "short":
            with nothing_left_while(shortage.TRAINING), pytest.raises(MemoryShortageError):
                bench.run(entry, EventLog(), Control())
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trainer.engine.loop.gradients", lambda session, *_: session.model / 0)
                with pytest.raises(TypeError):
                    bench.run(entry, EventLog(), Control())
    finally:
        gc.enable()
    assert order == ["dead", "their models return"]
    if ending == "short":
        assert bench.run(entry, EventLog(), Control()).reason == "done"


def test_alone_it_gives_everything_back_after_runs_and_pictures(case, monkeypatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("trainer.hosts.standalone.give_back", lambda: given.append("run"))
    monkeypatch.setattr("trainer.cli.draw.give_back", lambda: given.append("picture"))
    host = Standalone(case.places)
    with host.borrow(case.job(), EventLog()):
        assert not given
    with pytest.raises(ZeroDivisionError), host.borrow(case.job(), EventLog()):
        raise ZeroDivisionError
    assert given == ["run", "run"]
    bench, picture = Bench(host), Wish("a red circle", "", 1, (64, 64), 1, 1.0, model=str(case.model))
    assert bench.picture(picture).size == (64, 64)
    assert given == ["run", "run", "picture"]
    monkeypatch.setattr("trainer.cli.draw.sample_latents", lambda *_: Full().__torch_dispatch__(torch.empty, (), (1,)))
    with pytest.raises(
        MemoryShortageError, match="while generating an image .* Generate a smaller image; or close other"
    ):
        bench.picture(picture)
    assert given[3:] == ["picture"]
