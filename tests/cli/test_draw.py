"""Pictures for comparing are drawn as the LoRA was trained: prediction type, schedule, text encoder and clip skip."""

from __future__ import annotations

import engine_case
import pytest
from PIL import Image
from service_case import make

from trainer.cli import draw
from trainer.cli.worker import Bench
from trainer.ui.wish import Wish

pytestmark = pytest.mark.usefixtures("no_estimate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    case = engine_case.make(tmp_path_factory.mktemp("draw"))
    changes = {"model_v_pred": True, "model_zero_terminal_snr": True, "train_clip_skip": 2, "train_iterations": 1}
    return case, case.run(save_lora_name="own", **changes)


def test_the_job_of_the_lora_comes_first(trained):
    _, result = trained
    wish = Wish("a", lora="own", v_pred=False, clip_skip=1)
    found = draw.as_trained(wish, result.path)
    assert (found.v_pred, found.zero_snr, found.clip_skip) == (True, True, 2)


def test_what_is_asked_for_reaches_the_model(trained, monkeypatch):
    """The sampler's own calls, at strength 0 too: prediction, schedule and layer."""
    case, _ = trained
    seen = []

    class Host:
        def resolve(self, job):
            return job.replace(model=str(case.model))

        def txt2img(self, *asked):
            return None

        def places(self):
            return case.places

        def device(self):
            return None

    kept = draw.sample_latents

    def watched(model, *given, **named):
        seen.append((model.process.prediction, model.process.zero_snr))
        return kept(model, *given, **named)

    encoded = []
    own = draw.Model.encode_prompts
    monkeypatch.setattr(draw, "sample_latents", watched)
    monkeypatch.setattr(
        draw.Model, "encode_prompts", lambda self, prompts, skip=1: encoded.append(skip) or own(self, prompts, skip)
    )
    bench = Bench(Host())
    for strength in (1.0, 0.0):
        bench.picture(Wish("a", size=(64, 64), steps=1, lora="own", strength=strength))
    bench.picture(Wish("a", size=(64, 64), steps=1))
    assert seen == [("v_prediction", True)] * 2 + [("epsilon", False)] and encoded == [2, 2, 1]


def test_the_route_hands_on_what_the_form_says(tmp_path):
    case = make(tmp_path)
    asked = []
    case.backend.picture = lambda wish: asked.append(wish) or Image.new("RGB", (8, 8))
    body = {"prompt": "a", "seed": 1, "steps": 1, "cfg": 1, "width": 64, "height": 64, "strength": 1}
    of_the_model = {"model_v_pred": True, "model_zero_terminal_snr": True, "train_clip_skip": "3"}
    assert case.post("picture", {**body, **of_the_model}).status == 200
    assert (asked[0].v_pred, asked[0].zero_snr, asked[0].clip_skip) == (True, True, 3)
    assert case.post("picture", {**body, "train_clip_skip": "99"}).status == 422
    case.queue.close()
