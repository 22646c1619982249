"""fp16 with an enabled loss scaler on the CPU: every pair of precisions, overflows, the schedule, resuming."""

from __future__ import annotations

import math

import engine_case
import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters.base import ADAPTERS
from trainer.engine import loop
from trainer.engine.control import Control
from trainer.engine.run import Request, run
from trainer.errors import DivergedError, TrainingError
from trainer.events import EventLog, Note, Step
from trainer.maths import scaling
from trainer.maths.scaling import LossScaler
from trainer.models.load import load_model
from trainer.stages import lalora, start

pytestmark = pytest.mark.usefixtures("no_estimate")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW = {"network_blocks(BASE = TextEncoder)": ["M00", "OUT00"], "data_cache": "memory", "save_overwrite": True}
# Beyond what a gradient of fp16 holds: the first steps overflow by themselves until the scale has come down.
MUCH = 2.0**36


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("scaler"))


def train(case, *listeners, model="fp32", control=None, resume=None, **changes):
    """A run that really computes in the model's precision, which on a CPU it otherwise never does."""
    loaded = load_model(case.model)
    loaded.set_precision(storage=DTYPES[model], compute=DTYPES[model])
    job = case.job(**{**FEW, "train_model_precision": model, **changes})
    request = Request(job, case.places, model=loaded, resume=resume)
    return run(request, EventLog(*listeners), control)


def stop_at(step, control):
    def listener(event):
        if isinstance(event, Step) and event.step == step:
            control.stop()

    return listener


@pytest.fixture
def sessions(monkeypatch):
    """The sessions of the runs of a test, each as its first step begins."""
    seen, original = [], loop.run_steps

    def watched(session, *rest):
        seen.append(session)
        return original(session, *rest)

    monkeypatch.setattr("trainer.engine.run.run_steps", watched)
    return seen


@pytest.mark.parametrize("lora", DTYPES)
@pytest.mark.parametrize("model", DTYPES)
def test_every_pair_of_precisions_trains(case, sessions, model, lora):
    trace, plain = engine_case.Trace(), engine_case.Trace()
    settings = {"train_iterations": 6, "train_learning_rate": 1e-3, "save_precision": lora}
    path = train(case, trace, model=model, save_lora_name=f"{model}-{lora}", train_lora_precision=lora, **settings).path
    train(case, plain, model="fp32", save_lora_name="plain", **settings)
    session = sessions[0]
    assert session.scaler.is_enabled() == ("fp16" in (model, lora))
    assert {p.dtype for p in session.network.parameters()} == {DTYPES[lora]}
    assert {p.dtype for group in session.optimizer.param_groups for p in group["params"]} == {torch.float32}
    assert session.skips.total == 0 and len(trace.losses) == 6
    assert list(trace.losses.values()) == pytest.approx(list(plain.losses.values()), rel=3e-2)
    saved = {key: value for key, value in load_file(path).items() if not key.endswith("alpha")}
    assert {value.dtype for value in saved.values()} == {DTYPES[lora]}
    assert all(bool(value.any()) and bool(value.isfinite().all()) for value in saved.values())


@pytest.mark.parametrize("lora", ["fp16", "bf16"])
def test_small_steps_are_not_lost_in_half_precision(case, sessions, lora):
    """Steps of 1e-6 on numbers of about 0.1 are far below what half precision resolves; the masters add them up."""
    train(case, save_lora_name="small", train_lora_precision=lora, train_learning_rate=1e-6, train_iterations=5)
    flat = sessions[0].flat
    (values,), (masters,) = flat.values, flat.masters
    moved = (masters - values.float()).abs()
    assert bool((moved > 0).any()) and float(moved.max()) < 1e-2
    torch.testing.assert_close(values, masters.to(DTYPES[lora]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "lora", "optimizer"),
    [
        ("fp32", "fp16", "AdamW"),
        ("fp16", "fp32", "AdamW"),
        ("fp16", "fp16", "Lion"),
        ("fp32", "fp16", "AdamWScheduleFree"),
    ],
)
def test_overflowing_steps_are_skipped_and_resumed(case, sessions, monkeypatch, model, lora, optimizer):
    """Skipped, counted, reported, the schedule waits for them, and a resumed run does all of it bit for bit."""
    monkeypatch.setattr(scaling, "START", MUCH)
    changes = {
        "train_iterations": 26, "train_state_every": 1, "train_lora_precision": lora, "train_optimizer": optimizer,
        "train_lr_scheduler": "linear", "train_learning_rate": 1e-4,
    }  # fmt: skip
    whole, first = engine_case.Trace(), {}

    def look(event):
        if isinstance(event, Step) and event.step == 1:
            first["values"] = [value.clone() for value in sessions[0].flat.masters]

    before = []
    original = loop.optimizer_step

    def kept(session, plateau):
        if not session.step:
            before.append([value.clone() for value in session.flat.masters])
        return original(session, plateau)

    monkeypatch.setattr(loop, "optimizer_step", kept)
    train(case, whole, look, model=model, save_lora_name="whole", **changes)
    session = sessions[0]
    skipped = session.skips.total
    assert 2 <= skipped <= 16 and all(map(math.isfinite, whole.losses.values()))
    assert all(torch.equal(one, two) for one, two in zip(before[0], first["values"], strict=True))
    assert session.scaler.get_scale() == MUCH / 2**skipped
    steps = [event for event in whole.events if isinstance(event, Step)]
    assert steps[0].skipped == 1 and steps[-1].skipped == skipped
    notes = [event.text for event in whole.events if isinstance(event, Note)]
    assert f"{skipped} of 26 steps were skipped, because fp16 gradients overflowed." in notes
    # The schedule has not run ahead: after every multiple of ten steps it stands still until it has caught up.
    late = session.skips.unsettled + session.skips.owed
    assert session.scheduler.done == 26 - skipped + late and late <= 2 < skipped
    expected = 1e-4 * (1 - session.scheduler.done / 26)
    assert session.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)

    for stopped_at in (1, 12):  # right after a skipped step, and while the schedule stands still
        parts, control = engine_case.Trace(), Control()
        stop = stop_at(stopped_at, control)
        stopped = train(case, parts, stop, model=model, control=control, save_lora_name="parts", **changes)
        assert stopped.reason == "stopped" and max(parts.losses) == stopped_at
        train(case, parts, model=model, resume=stopped.folder, save_lora_name="parts", **changes)
        resumed = [event for event in parts.events if isinstance(event, Step)]
        told = [(event.step, event.loss, event.rates, event.skipped) for event in resumed]
        assert told == [(event.step, event.loss, event.rates, event.skipped) for event in steps], stopped_at
        ours, theirs = sessions[-1].flat.masters, session.flat.masters
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_a_run_that_learns_nothing_ends_with_advice(case, monkeypatch):
    original = loop.gradients

    def overflowing(session, step):
        loss = original(session, step)
        session.flat.gradients[0][3] = math.inf
        return loss

    monkeypatch.setattr(loop, "gradients", overflowing)
    trace = engine_case.Trace()
    with pytest.raises(DivergedError, match=r"fp16.*train_model_precision and train_lora_precision bf16 or fp32"):
        train(case, trace, model="fp16", train_lora_precision="fp16", save_lora_name="idle", train_iterations=60)
    assert max(trace.losses) <= 20


def test_more_than_twenty_skips_in_a_row_end_a_run_whatever_the_scale(case, monkeypatch):
    monkeypatch.setattr(scaling, "START", 2.0**30)
    original = loop.gradients

    def overflowing(session, step):
        loss = original(session, step)
        session.flat.gradients[0][3] = math.inf
        return loss

    monkeypatch.setattr(loop, "gradients", overflowing)
    trace = engine_case.Trace()
    with pytest.raises(DivergedError, match="in 21 steps in a row, up to step 21 .loss scale 512"):
        train(case, trace, train_lora_precision="fp16", save_lora_name="row", train_iterations=60)


def test_a_stop_before_the_tenth_step_does_not_change_what_the_plateau_sees(case):
    """reduce_on_plateau is told of the loss at multiples of ten steps, also in a run resumed between two of them."""
    changes = {
        "train_iterations": 24, "train_lr_scheduler": "reduce_on_plateau",
        "train_lr_scheduler_settings": "patience=0;threshold=0.9;cooldown=0",
    }  # fmt: skip
    whole, parts, control = engine_case.Trace(), engine_case.Trace(), Control()
    train(case, whole, save_lora_name="plateau", **changes)
    stopped = train(case, parts, stop_at(5, control), control=control, save_lora_name="plateau2",
                    train_state_every=5, **changes)  # fmt: skip
    train(case, parts, resume=stopped.folder, save_lora_name="plateau2", train_state_every=5, **changes)
    rates = [[event.rates for event in trace.events if isinstance(event, Step)] for trace in (whole, parts)]
    assert rates[0] == rates[1] and len(set(rates[0])) > 1 and parts.losses == whole.losses


@pytest.mark.parametrize("abm", [False, True])
def test_stages_train_in_half_precision_too(case, abm):
    """ABM takes steps of its own before the training; PiSSA starts at what the half parameters hold, exactly zero."""
    trace = engine_case.Trace()
    stage = {"abm_enabled": True, "abm_steps": 3, "abm_lr": 1e-3} if abm else {"network_init": "pissa"}
    train(case, trace, model="fp16", train_lora_precision="fp16", save_lora_name="stage", train_iterations=3, **stage)
    assert len(trace.losses) == 3 and all(map(math.isfinite, trace.losses.values()))


def test_a_state_from_before_there_were_masters_is_resumed(case, monkeypatch):
    """A bf16 LoRA used to be trained in bf16 throughout, its moments too."""
    from trainer.engine import state

    changes = {"train_lora_precision": "bf16", "train_iterations": 6, "train_state_every": 3, "save_lora_name": "old"}
    control = Control()
    stopped = train(case, stop_at(3, control), control=control, **changes)
    tensors, facts = state.read_state(stopped.folder)
    old = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    facts = {**{key: value for key, value in facts.items() if key != "skips"}, "format": state.OLD_FORMAT}
    monkeypatch.setattr("trainer.engine.run.read_state", lambda folder: (old, facts))
    trace = engine_case.Trace()
    assert train(case, trace, resume=stopped.folder, **changes).reason == "done"
    assert sorted(trace.losses) == [4, 5, 6]


def test_the_scaler_does_what_torch_does(monkeypatch):
    """Scales, skips and weights of torch's GradScaler for the same gradients, for a fused optimizer and another."""
    for name in ("AdamW", "SGD"):
        extra = {"fused": True} if name == "AdamW" else {"momentum": 0.9}
        sides = []
        for ours in (True, False):
            gradient, weight = torch.zeros(4), torch.nn.Parameter(torch.ones(4))
            weight.grad = gradient
            optimizer = getattr(torch.optim, name)([weight], lr=0.1, **extra)
            monkeypatch.setattr(scaling, "GROWTH_INTERVAL", 3)
            scaler = LossScaler([gradient], True) if ours else torch.amp.GradScaler("cpu", growth_interval=3)
            seen, stream = [], torch.Generator().manual_seed(1)
            for step in range(12):
                gradient.zero_()
                scaler.scale((weight * torch.randn(4, generator=stream)).sum()).backward()
                if step in (2, 3, 9):
                    gradient[1] = math.inf if step != 3 else math.nan
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                seen.append((scaler.get_scale(), weight.tolist()))
            sides.append(seen)
            state = scaler.state_dict()
        assert sides[0] == sides[1] and {scale for scale, _ in sides[0]} > {2.0**14, 2.0**16}
        again = LossScaler([torch.zeros(4)], True)
        again.load_state_dict(state)
        assert again.get_scale() == sides[1][-1][0]


def test_every_adapter_type_has_masters_in_half_precision(case):
    """Two steps of each in fp16, text encoder included; what is exported is what the masters hold."""
    loaded = load_model(case.model)
    loaded.set_precision(storage=torch.float16, compute=torch.float16)
    words = {"mode": "iLECO", "original prompt": "red", "target prompt": "blue", "lora_data_directory": ""}
    blocks = {"network_blocks(BASE = TextEncoder)": ["BASE", "M00"], "network_train_text_encoder": True}
    others = ({"use_dora": True}, {"network_type": "c3lier", "network_tucker": True}, {"network_init": "pissa"})
    for name in (*({"network_type": name} for name in ADAPTERS.names()), *others):
        job = case.job(**{**FEW, **words, **blocks, **name}, train_lora_precision="fp16")
        session = engine_case.session(case, job, loaded)
        try:
            before = [master.clone() for master in session.flat.masters]
            assert all(math.isfinite(float(loop.optimizer_step(session, None))) for _ in range(2)), name
            trained = [p for p in session.network.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {torch.float16} and len(trained) == len(session.flat.trained), name
            assert not all(torch.equal(*pair) for pair in zip(before, session.flat.masters, strict=True)), name
            with session.evaluating():
                exact = [p for p in session.network.parameters() if p.requires_grad]
                assert [id(p) for p in exact] == [id(p) for p in session.flat.trained], name
                assert all(bool(value.isfinite().all()) for value in session.network.export().values()), name
        finally:
            session.network.eject()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_optimizers_decide_only_where_they_look_at_the_flag(device):
    """On other devices than the CPU and CUDA the fused kernels take found_inf and step all the same."""
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer._step_supports_amp_scaling = True
    assert scaling.takes_mask(optimizer) is (device == "cpu")
    steps, gradient = [], torch.tensor([torch.inf])
    optimizer.step = lambda: steps.append(getattr(optimizer, "found_inf", None))
    scaler = LossScaler([gradient], True)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert [bool(flag) for flag in steps] == ([True] if device == "cpu" else [])


@pytest.mark.parametrize("large", [2.0**12, 2.0**40])
def test_a_start_from_gradients_is_scaled_down_until_fp16_holds_them(case, monkeypatch, large):
    """LoRA-GA finds the same gradients whatever scale it begins with, and no inf enters the adapter."""
    monkeypatch.setattr(start, "_HALF_SCALE", large)
    scales, found, original = [], {}, start.weight_gradients

    def watched(modules, loss, scale):
        scales.append(scale)
        found[scale] = original(modules, loss, scale)
        return found[scale]

    monkeypatch.setattr(start, "weight_gradients", watched)
    trace = engine_case.Trace()
    train(case, trace, model="fp16", network_init="lora_ga", save_lora_name="ga", train_iterations=2)
    assert all(map(math.isfinite, trace.losses.values())) and scales[-1] <= 2.0**24
    assert scales == [large / 16**n for n in range(len(scales))] and (len(scales) > 1) == (large > 2.0**24)
    half = torch.cat([gradient.flatten() for gradient in found[scales[-1]]])
    train(case, model="fp32", network_init="lora_ga", save_lora_name="ga", train_iterations=2)
    exact = torch.cat([gradient.flatten() for gradient in found[1.0]])
    assert (half - exact).norm() < 2e-2 * exact.norm()


def test_a_curvature_is_scaled_down_until_fp16_holds_its_gradients(case, sessions, monkeypatch):
    settings = {"lalora_lambda": 1.0, "lalora_prompts": "a circle", "train_iterations": 1, "save_lora_name": "lalora"}
    factors = []
    for large in (2.0**10, 2.0**44):
        monkeypatch.setattr(lalora, "SCALE", large)
        train(case, model="fp16", **settings)
        (stage,) = sessions[-1].stages
        factors.append(torch.cat([rows.sum() * columns for rows, columns in stage._factors.values()]))
    assert all(bool(one.isfinite().all()) for one in factors)
    assert (factors[0] - factors[1]).norm() < 5e-2 * factors[0].norm()


def test_gradients_that_no_scale_makes_finite_are_an_error_that_says_what_to_do(case, monkeypatch):
    original = lalora.probe
    monkeypatch.setattr(lalora, "probe", lambda *given: original(*given) * math.inf)
    with pytest.raises(TrainingError, match="train_model_precision bf16 or fp32"):
        train(case, model="fp16", lalora_lambda=1.0, lalora_prompts="a circle", save_lora_name="never")
