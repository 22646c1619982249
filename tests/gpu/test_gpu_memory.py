"""Full-size random models on a card: what they take, that they fit, and running out of memory.

Minutes, and 7 GB of disk: `pytest -m gpu tests/gpu/test_gpu_memory.py`.
"""

from __future__ import annotations

import engine_case
import gpu_case
import pytest
import torch
from gpu_case import CUDA, GIB, MIB, settled, train

from trainer.engine import loop
from trainer.errors import MemoryShortageError
from trainer.events import Note, Preflight, Sampled, Saved
from trainer.models.load import load_model
from trainer.models.room import Peak

pytestmark = pytest.mark.gpu

LIMIT = 6.4 * GIB
SLACK = 0.15
"""By how much the estimate may be off."""


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return gpu_case.full("sd1", tmp_path_factory.mktemp("sd1"), 512, images=4)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return gpu_case.full("sdxl", tmp_path_factory.mktemp("sdxl"), 1024)


@pytest.fixture
def limited():
    """Make the card as small as one of so many bytes; afterwards it is itself again."""
    total = torch.cuda.mem_get_info(CUDA)[1]

    def limit(size: float) -> None:
        settled()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), CUDA)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def full_train(case, *listeners, **changes):
    """A run of all blocks."""
    everywhere = {"network_blocks(BASE = TextEncoder)": gpu_case.BLOCKS}
    return train(case, *listeners, **{**everywhere, "data_cache": "disk", **changes})


def figures(report: dict[str, object]) -> list[int]:
    """Every figure in MB that the report has of a training step; the largest is its peak."""
    found: list[int] = []
    for key, value in report.items():
        if "memory" in key and isinstance(value, int):
            found.append(value)
        elif "memory" in key and isinstance(value, dict):
            found += [one for one in value.values() if isinstance(one, int)]
    return found


def test_checkpointing_needs_much_less(sd1):
    peaks, gradients = [], []
    for on in (False, True):
        made = gpu_case.session(sd1, load_model(sd1.model, device=CUDA, vocabularies=sd1.places.vocabularies),
                                **{"network_blocks(BASE = TextEncoder)": gpu_case.BLOCKS},
                                use_gradient_checkpointing=on, save_lora_name="checkpointing")  # fmt: skip
        try:
            gpu_case.moved(made)
            before, peak = settled()[0], Peak(CUDA)
            loop.gradients(made, 0)
            peaks.append(peak.bytes - before)
            gradients.append(torch.cat([flat.cpu() for flat in made.flat.gradients]))
        finally:
            made.network.eject()
        del made
    assert peaks[1] < 0.6 * peaks[0], peaks
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], 0)
    assert float(cosine) > 0.999


@pytest.mark.parametrize("batch", [1, 4])
def test_sd1_takes_what_was_estimated(sd1, batch):
    check_estimate(sd1, train_batch_size=batch)


def test_sdxl_takes_what_was_estimated_and_fits(sdxl):
    assert check_estimate(sdxl, use_gradient_checkpointing=True) <= LIMIT


def check_estimate(case, **changes) -> int:
    """The peak of the training steps of a run, compared with what the report said; its bytes."""
    reports, peaks = [], []
    original = loop.optimizer_step

    def measured(made, plateau):
        peak = Peak(CUDA)
        loss = original(made, plateau)
        peaks.append(peak.bytes)
        return loss

    def listen(event):
        if isinstance(event, Preflight):
            reports.append(event.report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", measured)
        full_train(case, listen, save_lora_name="estimate", **changes)
    told = figures(reports[0])
    steady = peaks[-1]
    assert told and any(abs(one * MIB - steady) < SLACK * steady for one in told), (told, steady / MIB)
    return steady


def test_sdxl_runs_as_a_whole_on_a_card_of_8_gb(sdxl, limited):
    """Loading, encoding two images of 1024, three steps, a preview, saving: on what Windows leaves of 8 GB."""
    limited(7.2 * GIB)
    events = []
    result = full_train(sdxl, events.append, save_lora_name="eight", use_gradient_checkpointing=True,
                        data_cache="memory", sample_prompts="a circle", sample_every=3, sample_steps=2)  # fmt: skip
    assert result.reason == "done" and any(isinstance(event, Saved) for event in events)
    assert any(isinstance(event, Sampled) for event in events), [e.text for e in events if isinstance(e, Note)]


def test_running_out_of_memory_is_said_and_given_back(sd1, tmp_path, limited):
    tiny_case = engine_case.make(tmp_path)
    train(tiny_case, save_lora_name="first", train_iterations=1)  # whatever CUDA sets up once
    before = settled()
    limited(1 * GIB)
    with pytest.raises(MemoryShortageError) as caught:
        full_train(sd1, save_lora_name="none", train_batch_size=4)
    assert "GiB are needed" in str(caught.value) and "train_" in str(caught.value)
    del caught
    after = settled()
    assert after[0] == before[0] and after[1] <= before[1] + 64 * MIB
    assert train(tiny_case, save_lora_name="second", train_iterations=1).reason == "done"
