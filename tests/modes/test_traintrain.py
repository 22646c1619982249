"""TrainTrain's rules, written down again from what its program does, beside ours: on real, tiny models."""

from __future__ import annotations

import dataclasses

import engine_case
import numpy as np
import pair_case
import pytest
import tiny
import torch
from PIL import Image

from trainer.data import pairs
from trainer.data.cache import TensorCache
from trainer.demo import world
from trainer.engine import loop
from trainer.engine.arguments import find_pair_data, pair_prompts, prompts, unused_prompts
from trainer.engine.catalogue import catalogue
from trainer.engine.passes import Passes, plan_passes
from trainer.engine.preflight import check_before_loading
from trainer.engine.process import Process
from trainer.engine.site import Site
from trainer.events import EventLog
from trainer.maths import rng
from trainer.params.codec import load
from trainer.params.core import Train

pytestmark = pytest.mark.usefixtures("no_estimate")


BLUE = dataclasses.replace(pair_case.BEFORE, colour="blue")  # differs on a part of the picture


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = pair_case.make(tmp_path_factory.mktemp("seed"))
    pair_case.write_pair(made.pictures, after=BLUE, name="part")
    return made


@pytest.fixture
def session(case):
    made = []

    def make(kind="sd1", v_pred=False, **changes):
        files = {
            key: str(case.pictures / name)
            for key, name in {"original image": "part.png", "target image": "part_t.png"}.items()
        }
        rates = {"train_lr_scheduler": "constant", "train_max_grad_norm": 0}
        settings = {"target prompt": "black", **files, **rates, **changes}
        made.append(engine_case.session(case, case.job(**settings), tiny.model(kind, v_pred=v_pred)))
        return made[-1]

    yield make
    for one in made:
        one.network.eject()


def get_scheduler(optimizer, steps):
    """The schedule of its default, cosine, as its source makes it."""
    from diffusers.optimization import get_scheduler as made

    return made("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps, num_cycles=1, power=1.0)


def its_sizes(latents):
    """What SDXL is given: rows and columns of the latents, no crop, the same again."""
    height, width = latents.shape[-2:]
    return torch.tensor([[height, width, 0, 0, height, width]] * len(latents), dtype=torch.float32)


def train_as_traintrain(made, words, *, ratio=1.0, masks=None, revert=False, steps=4):
    """Its loop for pairs (7b58929), by what the program does with every default left alone; losses of its steps.

    `words`: original and target prompt as typed. `masks`: index of a pair → its mask, multiplied in.
    """
    model, network = made.model, made.network
    optimizer = torch.optim.AdamW(list(network.parameters()), lr=1e-3)
    schedule = get_scheduler(optimizer, steps)
    contexts = [model.encode_prompts([word]) for word in words]
    losses = []
    for step in range(steps):
        batch = made.source.batch(step)
        count, shape = len(batch.samples), batch.mean.shape[1:]
        draw = rng.normal(shape, "posterior", 3, step, list(batch.samples))
        z_original, z_target = batch.mean + batch.std * draw, batch.target_mean + batch.target_std * draw
        noise = rng.normal(shape, "noise", 3, step, list(batch.samples))
        turn = step % 2 == 0
        seen, shown = (z_original, z_target) if turn else (z_target, z_original)
        if not turn and ratio < 0:
            seen = shown = noise
        t = torch.tensor([550 + 100 * (step // 2)] * count)
        alpha = model.process.alphas_cumprod_T[t].double().view(-1, 1, 1, 1)
        x_seen, x_shown = (alpha.sqrt().float() * z + (1 - alpha).sqrt().float() * noise for z in (seen, shown))
        original, target = (row.expand(count) for row in contexts)
        ids = its_sizes(noise) if made.model.family.name == "sdxl" else None
        with torch.no_grad(), network.at_strength(0.0):
            wanted = model.predict(x_seen, t, original, ids)
        with network.at_strength(0.25 if turn else -0.25 * abs(ratio)):
            predicted = model.predict(x_shown, t, target, ids)
        if masks is not None:
            mask = torch.stack([masks[index] for index in made.source.plan.batch(step)])
            predicted, wanted = predicted * mask, wanted * mask
        weight = (5 * (1 - alpha) / alpha).flatten().clamp(max=1).float()
        loss = (((predicted - wanted) ** 2).mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad(set_to_none=False)  # the gradients are views that the engine reads
        if loss.requires_grad:  # at strength 0 the LoRA has no part in it
            loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def assert_the_same(made, start, losses):
    """The engine's own steps from the same start: losses, and weights to a hundredth of the way."""
    end = [flat.clone() for flat in made.flat.values]
    for flat, value in zip(made.flat.values, start, strict=True):
        flat.copy_(value)
    again = [float(loop.optimizer_step(made, None)) for _ in range(4)]
    assert again == pytest.approx(losses, rel=1e-4)
    for one, other, value in zip(made.flat.values, end, start, strict=True):
        assert (one - other).norm() < 1e-2 * (other - value).norm()


RULE = {"train_traintrain_compatible": True, "train_min_timesteps": 500}


@pytest.mark.parametrize(
    ("kind", "v_pred", "changes"),
    [
        ("sd1", False, {"diff_use_diff_mask": True, "lora_trigger_word": "trg"}),
        ("sd2", True, {"diff_alt_ratio": 0.5}),
        ("sd1", False, {"diff_alt_ratio": -0.5}),
        ("sd1", False, {"diff_alt_ratio": 0, "diff_revert_original_target": True}),
        ("sdxl", False, {}),
    ],
)
def test_traintrains_addift_is_reproduced(case, kind, v_pred, changes):
    """Losses and weights of four steps of one pair: no clipping, no trigger word, no mask, sizes in latents, + and − in
    turns at fixed timesteps, a prompt that keeps its place when the pictures are swapped, ε's min-SNR, AdamW, cosine.
    """
    files = {"original image": str(case.pictures / "part.png"), "target image": str(case.pictures / "part_t.png")}
    job = case.job(**{"target prompt": "black", **files, **RULE, **changes})
    made = engine_case.session(case, job, tiny.model(kind, v_pred=v_pred))
    try:
        assert made.limits.max_grad_norm == 0 and made.source.batch(0).mask is None
        start = [flat.clone() for flat in made.flat.values]
        losses = train_as_traintrain(made, ("a circle", "black"), ratio=changes.get("diff_alt_ratio", 1.0))
        assert_the_same(made, start, losses)
    finally:
        made.network.eject()


def test_traintrains_multi_addift_is_reproduced(case, tmp_path):
    """A folder of three pairs at batch 4: the typed prompts in place of the captions that are there, buckets filled to
    whole batches, the original's transparency as mask (above a tenth, one pixel for each latent), not mirrored with it.
    """
    cut = np.full((64, 64), 255, np.uint8)
    cut[:, :30] = 20  # below a tenth of 255; the latents' pixels stand at 0, 8, 16, 24 …
    for number in range(3):
        for name, scene, alpha in ((f"p{number}", pair_case.BEFORE, cut), (f"p{number}_t", pair_case.AFTER, None)):
            pixels = pair_case.picture(scene, number)
            layers = [pixels] if alpha is None or number == 2 else [pixels, alpha[..., None]]
            Image.fromarray(np.concatenate(layers, 2)).save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_text("something else", encoding="utf-8")
    changes = {"lora_data_directory": str(tmp_path), "train_batch_size": 4, "diff_use_diff_mask": True,
               "lora_trigger_word": "trg", "image_mirroring": True}  # fmt: skip
    job = case.job(mode="Multi-ADDifT", **RULE, **changes)
    job = job.replace(original_prompt="a circle", target_prompt="black")
    made = engine_case.session(case, job, tiny.model("sd1"))
    try:
        half = torch.ones(1, 8, 8)
        half[:, :, :4] = 0
        items = [made.source.pairs.item(index) for index in range(6)]
        masks = [torch.ones(1, 8, 8) if item.picture.name == "p2.png" else half for item in items]
        assert sorted(len(batch) for batch in made.source.plan.epoch(0)) == [2, 4]  # six with the mirrored ones
        assert made.source.batch(0).prompts[0] == "a circle" and made.source.batch(0).targets[0] == "black"
        start = [flat.clone() for flat in made.flat.values]
        assert_the_same(made, start, train_as_traintrain(made, ("a circle", "black"), masks=masks))
    finally:
        made.network.eject()
    few = engine_case.session(case, job.replace(image_mirroring=False), tiny.model("sd1"))
    few.network.eject()
    assert {len(batch) for batch in few.source.plan.epoch(0)} == {4}


def train_pictures_as_traintrain(made, words=None, steps=4):
    """Its loop for a folder, and for each pass of Difference (7b58929), every default left alone; losses of its steps.

    `words`: the one prompt of all samples, encoded once; without it the captions are encoded in every step, by the
    text encoder as it is trained then.
    """
    model, network, seed = made.model, made.network, made.seed
    optimizer = torch.optim.AdamW(list(network.parameters()), lr=1e-3)
    schedule = get_scheduler(optimizer, steps)
    with network.at_strength(0.0), torch.no_grad():
        fixed = None if words is None else model.encode_prompts([words])
    losses = []
    for step in range(steps):
        batch = made.source.batch(step)
        samples, shape = list(batch.samples), batch.mean.shape[1:]
        latents = batch.mean + batch.std * rng.normal(shape, "posterior", seed, step, samples)
        noise = rng.normal(shape, "noise", seed, step, samples)
        one_for_all = made.job[Train].train_fixed_timsteps_in_batch
        uniform = rng.uniform("timestep", seed, step, [0] * len(samples) if one_for_all else samples)
        t = (uniform * 1000).long()  # 0 to 999, as torch.randint draws them
        alpha = model.process.alphas_cumprod_T[t].double()
        signal, sigma = (part.sqrt().float().view(-1, 1, 1, 1) for part in (alpha, 1 - alpha))
        text = model.encode_prompts(list(batch.prompts)) if fixed is None else fixed.expand(len(samples))
        ids = its_sizes(noise) if model.family.name == "sdxl" else None
        predicted = model.predict(signal * latents + sigma * noise, t, text, ids)
        v_pred = model.process.prediction == "v_prediction"
        target = signal * noise - sigma * latents if v_pred else noise
        weight = (5 * (1 - alpha) / alpha).clamp(max=1).float()
        loss = (((predicted - target) ** 2).mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad(set_to_none=False)  # the gradients are views that the engine reads
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


PLAIN = {"train_traintrain_compatible": True, "train_iterations": 4, "data_cache": "memory"}


@pytest.mark.parametrize(
    ("kind", "v_pred", "changes"),
    [
        ("sd1", False, {}),
        ("sd2", True, {"train_fixed_timsteps_in_batch": True, "lora_trigger_word": "trg"}),
        ("sdxl", False, {}),
    ],
)
def test_traintrains_lora_is_reproduced(case, tmp_path, kind, v_pred, changes):
    """Losses and weights of four steps of a folder: captions after the trigger word, encoded by the text encoder that
    is trained with the UNet, timesteps over the whole range, a bucket filled to whole batches, sizes in latents.
    """
    scenes = world.draw_scenes(3, np.random.default_rng(5), "base")
    world.write_folder(tmp_path, scenes, seed=5)
    given = {"mode": "LoRA", "lora_data_directory": str(tmp_path), "train_batch_size": 4, **PLAIN, **changes}
    job = load(engine_case.Case.settings(case, **given), catalogue()).job
    made = engine_case.session(case, job, tiny.model(kind, v_pred=v_pred))
    try:
        trigger = f"{changes['lora_trigger_word']}, " if changes else ""
        captions = {trigger + path.read_text(encoding="utf-8").strip() for path in tmp_path.glob("*.txt")}
        assert set(made.source.prompts()) == captions and made.kit.trains_text
        assert made.limits.max_grad_norm == 0 and {len(batch) for batch in made.source.plan.epoch(0)} == {4}
        start = [flat.clone() for flat in made.flat.values]
        assert_the_same(made, start, train_pictures_as_traintrain(made))
    finally:
        made.network.eject()


@pytest.mark.parametrize(("kind", "v_pred"), [("sd1", False), ("sd2", True), ("sdxl", False)])
def test_traintrains_difference_is_reproduced(case, tmp_path, kind, v_pred):
    """Losses and weights of four steps of each pass: the original by heart, then the target with the original's prompt
    on top of the frozen first one; no trigger word, the text encoder left alone.
    """
    changes = {"mode": "Difference", "target prompt": "a circle", "lora_trigger_word": "trg", "train_batch_size": 2}
    job = case.job(**PLAIN, **changes)
    where = Site(case.places, Process(), EventLog(), tmp_path, TensorCache(None))
    plans = plan_passes(job)
    model = tiny.model(kind, v_pred=v_pred)
    passes = Passes(plans, model, where, check_before_loading(job, case.places), drawn=False)
    try:
        for plan in plans:
            made = passes.begin(plan, resumed=False)
            assert made.limits.max_grad_norm == 0 and made.source.batch(0).prompts == ("a circle",) * 2
            assert not made.kit.trains_text
            start = [flat.clone() for flat in made.flat.values]
            assert_the_same(made, start, train_pictures_as_traintrain(made, "a circle"))
            passes.settle(plan, made, trained=True)
    finally:
        passes.close()


def test_in_other_modes_sizes_are_in_latents_too_and_difference_has_one_prompt(case):
    settings = engine_case.Case.settings(case, mode="LoRA", data_cache="memory", **RULE)
    made = engine_case.session(case, load(settings, catalogue()).job, tiny.model("sdxl"))
    made.network.eject()
    assert made.source.batch(0).time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 2
    job = case.job(mode="Difference", lora_trigger_word="trg", **{"target prompt": "black"}, **RULE)
    found = find_pair_data(job)
    assert {picture.caption for side in (found.originals, found.targets) for picture in side.pictures} == {"a circle"}
    tall = case.job(mode="iLECO", **{"target prompt": "b"}, **RULE).replace(image_size=(96, 64))
    assert prompts(tall).size == (64, 96)  # sorted, short side first
    assert prompts(tall.replace(train_traintrain_compatible=False)).size == (96, 64)


def test_its_files_have_no_trigger_word_before_the_prompts_of_a_pair(case):
    """Also without the switch: there it only decides whether the text encoder is trained."""
    own = {"image_size(height, width)": "512", "mode": "ADDifT", "original prompt": "a", "target prompt": "",
           "lora_trigger_word": "trg", "original image": "a.png", "target image": "b.png"}  # fmt: skip
    loaded = load(own, catalogue())
    assert pair_prompts(loaded.job) == ("a", "") and "lora_trigger_word" in loaded.warnings[0]
    ours = load({"format": 1, **own}, catalogue())
    assert pair_prompts(ours.job) == ("trg, a", "trg, a")


def test_prompts_stand_in_for_captions_that_are_missing(case, tmp_path):
    """In a folder by our rules; where all are there, what was typed is reported to have no effect."""
    for number in range(2):
        pair_case.write_pair(tmp_path, name=f"p{number}", seed=number)
    (tmp_path / "p1.txt").unlink()
    job = case.job(mode="Multi-ADDifT", lora_data_directory=str(tmp_path), lora_trigger_word="trg",
                   diff_revert_original_target=True)  # fmt: skip
    job = job.replace(original_prompt="a circle", target_prompt="")
    found = find_pair_data(job)
    captions = {picture.name: picture.caption for side in (found.originals, found.targets) for picture in side.pictures}
    assert captions["p1.png"] == "trg, a circle" and captions["p1_t.png"].startswith("trg, a small red circle")
    assert not list(unused_prompts(job, found))
    (tmp_path / "p1.txt").write_text("a", encoding="utf-8")
    assert list(unused_prompts(job, find_pair_data(job))) == [
        "original prompt has no effect: every image has a caption of its own, which is used instead."
    ]


def test_our_mask_is_normalised(session):
    """The distance inside the mask counts as if the picture had nothing else."""
    made = session(diff_use_diff_mask=True, train_snr_gamma=0)
    one, other = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, 2:4, 5:8] = 1
    expected = ((one - other)[:, :, 2:4, 5:8] ** 2).mean()
    found = made.kit.loss(one, other, torch.tensor([500]), mask)
    torch.testing.assert_close(found, expected[None])
    shown = made.source.batch(0).mask
    assert shown.shape == (1, 1, 8, 8) and 0 < shown.mean() < 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"network_type": "c3lier"}, {"network_timestep_rank": 1}])
def test_options_know_a_strength_per_sample_too(session, options, monkeypatch):
    """Both directions in one forward have the mean gradient of the two alone, with what can be added to a type."""
    from trainer.engine.kit import Kit

    made = session(train_batch_size=2, **options)
    stream = torch.Generator().manual_seed(7)
    for flat in made.flat.values:
        flat.add_(torch.randn(flat.shape, generator=stream).mul(0.05).to(flat))
    loop.gradients(made, 0)
    together = [gradient.clone() for gradient in made.flat.gradients]
    monkeypatch.setattr(Kit, "per_sample", False)
    alone = []
    for step in range(2):
        loop.gradients(made, step)
        alone.append([gradient.clone() for gradient in made.flat.gradients])
    for both, forward, backward in zip(together, *alone, strict=True):
        mean = (forward + backward) / 2
        assert (both - mean).norm() <= 2e-3 * mean.norm() and mean.norm() > 0


def test_pictures_that_hardly_differ_have_no_mask(tmp_path):
    """Three levels in each channel: enough without a mask, nothing that a mask would leave."""
    for name, level in (("a.png", 100), ("a_t.png", 103)):
        Image.new("RGB", (64, 64), (level,) * 3).save(tmp_path / name)
    files = tmp_path / "a.png", tmp_path / "a_t.png", ("", "")
    assert len(pairs.single_pair(*files).originals.pictures) == 1
    with pytest.raises(pairs.DataError, match=r"a.png and a_t.png \(no pixel differs clearly, so diff_use_diff_mask"):
        pairs.single_pair(*files, masked=True)
    case = pair_case.PairCase(tmp_path, tmp_path, tmp_path)
    given = {"original image": str(files[0]), "target image": str(files[1]), "lora_data_directory": str(tmp_path)}
    for mode in ("ADDifT", "Multi-ADDifT"):
        assert find_pair_data(case.job(mode=mode, **given))
        with pytest.raises(pairs.DataError, match="no pixel differs clearly"):
            find_pair_data(case.job(mode=mode, diff_use_diff_mask=True, **given))
    Image.new("RGB", (64, 64), (104,) * 3).save(tmp_path / "a_t.png")
    assert pairs.single_pair(*files, masked=True)


def test_ten_samples_meet_every_tenth_of_the_range(session):
    made = session(train_batch_size=5, train_min_timesteps=200, train_max_timesteps=400)
    seen = []
    hook = made.model.unet.register_forward_pre_hook(lambda _, given: seen.append(given[1].tolist()))
    for step in range(2):
        made.mode.loss(made.kit, made.source.batch(step))
    hook.remove()
    teacher, student = seen[::2], seen[1::2]
    assert teacher == student and [t[:5] for t in teacher] == [t[5:] for t in teacher]  # one for both directions
    assert sorted((t - 200) // 20 for one in teacher for t in one[:5]) == list(range(10))


def test_sdxl_is_told_the_sizes_of_a_pair_in_pixels(session):
    made = session("sdxl")
    assert made.source.batch(0).time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
