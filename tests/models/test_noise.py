"""Prediction types and schedules: where they are read, in which order, and that a perfect predictor has loss 0."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from trainer.errors import ModelError
from trainer.maths.alphas import scaled_linear_alphas, zero_terminal_snr
from trainer.maths.process import EPSILON, V_PREDICTION, Diffusion
from trainer.models.families.sd1 import SD1
from trainer.models.families.sd2 import SD2
from trainer.models.families.sdxl import SDXL
from trainer.models.load import load_model
from trainer.models.noise import NoiseFacts, noise_of_file, noise_of_scheduler, process_of

LDM_V = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
LDM_EPS = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    timesteps: 1000\n"
SGM_V = "          scaling_config:\n            target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n"
SGM_EPS = SGM_V.replace("VScaling", "EpsScaling")


def test_the_order_of_trust(tmp_path):
    path = tmp_path / "model.safetensors"
    said = {"modelspec.prediction_type": "v"}
    assert noise_of_file((), {}, path).prediction is None
    assert noise_of_file((), said, path).prediction == V_PREDICTION
    assert noise_of_file((), {"modelspec.predict_key": "epsilon"}, path).prediction == EPSILON
    assert noise_of_file(("v_pred",), {"modelspec.prediction_type": "epsilon"}, path).prediction == V_PREDICTION
    path.with_suffix(".json").write_text(json.dumps({"prediction_type": "epsilon"}))
    assert noise_of_file(("v_pred",), said, path).prediction == EPSILON
    path.with_suffix(".json").write_text(json.dumps({"description": "a WebUI's card"}))
    assert noise_of_file((), said, path).prediction == V_PREDICTION
    for text, expected in ((LDM_V, V_PREDICTION), (LDM_EPS, EPSILON), (SGM_V, V_PREDICTION), (SGM_EPS, EPSILON)):
        path.with_suffix(".yaml").write_text(text)
        assert noise_of_file(("v_pred",), said, path).prediction == expected
    path.with_suffix(".yaml").write_text("something: else\n")
    path.with_suffix(".json").write_text("not json")
    assert noise_of_file((), said, path).prediction == V_PREDICTION
    assert process_of(NoiseFacts(EPSILON), SD1, True)[0].prediction == V_PREDICTION


def test_a_silent_model_is_epsilon_and_a_silent_sd2_is_warned_of():
    process, warnings = process_of(NoiseFacts(), SD1, False)
    assert process.prediction == EPSILON and not warnings
    process, warnings = process_of(NoiseFacts(), SD2, False)
    assert process.prediction == EPSILON and "model_v_pred" in warnings[0]
    assert not process_of(NoiseFacts(), SD2, True)[1] and not process_of(NoiseFacts(V_PREDICTION), SD2, False)[1]
    assert "although the model says" in process_of(NoiseFacts(EPSILON), SDXL, True)[1][0]


def test_marked_files_end_at_zero_signal(tmp_path):
    vocabulary = [tiny.vocabulary(tmp_path / "vocabulary")]
    tensors = {**tiny.checkpoint("sd1"), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors", vocabularies=vocabulary)
    assert model.process.prediction == V_PREDICTION and model.process.alphas_cumprod_T[-1] == 0
    torch.testing.assert_close(model.process.alphas_cumprod_T, zero_terminal_snr(scaled_linear_alphas()))
    assert tiny.model("sd1").process.alphas_cumprod_T[-1] > 0.004


def test_versions_in_lora_files_follow_the_prediction():
    found = {(kind, v): tiny.model(kind, v_pred=v).family.base_version for kind in tiny.KINDS for v in (False, True)}
    assert found == {
        ("sd1", False): "sd_v1", ("sd1", True): "sd_v1_v", ("sd2", False): "sd_v2", ("sd2", True): "sd_v2_v",
        ("sdxl", False): "sdxl_base_v1-0", ("sdxl", True): "sdxl_base_v1-0",
    }  # fmt: skip


def test_a_folders_scheduler_rules(tmp_path):
    folder = tiny.folder("sd2", tmp_path / "model", prediction="v_prediction")
    model = load_model(folder)
    assert model.process.prediction == V_PREDICTION and model.family.base_version == "sd_v2_v" and not model.warnings
    betas = [0.1, 0.2, 0.5]
    assert noise_of_scheduler({"trained_betas": betas}).alphas_T.tolist() == pytest.approx([0.9, 0.72, 0.36])
    linear = noise_of_scheduler(
        {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
    )
    assert linear.alphas_T.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])
    assert noise_of_scheduler({"rescale_betas_zero_snr": True}).zero_snr
    for wrong in ({"beta_schedule": "sigmoid"}, {"prediction_type": "sample"}):
        with pytest.raises(ModelError, match=f"scheduler_config.json: {next(iter(wrong))}"):
            noise_of_scheduler(wrong)


class Perfect(torch.nn.Module):
    """A UNet that recovers ε or v from x_t because it knows the latents."""

    def __init__(self, latents, alphas_T, prediction) -> None:
        super().__init__()
        self.latents, self.alphas_T, self.prediction = latents, alphas_T.double(), prediction

    def forward(self, x, t, context, added_cond_kwargs=None, return_dict=False):
        a = self.alphas_T[t].view(-1, 1, 1, 1)
        noise = (x.double() - a.sqrt() * self.latents) / (1 - a).sqrt()
        v = a.sqrt() * noise - (1 - a).sqrt() * self.latents
        return ((noise if self.prediction == EPSILON else v).float(),)


@pytest.mark.parametrize("prediction", [EPSILON, V_PREDICTION])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_perfect_predictor_has_loss_zero(prediction, zero_snr):
    model = tiny.model("sd1")
    alphas = zero_terminal_snr(scaled_linear_alphas()) if zero_snr else scaled_linear_alphas()
    model.process = Diffusion(alphas, prediction)
    rng = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(5, 4, 8, 8, generator=rng) for _ in range(2))
    t = torch.tensor([3, 100, 500, 998, 999])
    model.unet = Perfect(latents, alphas, prediction)
    cond = model.encode_prompts(["a"]).expand(5)
    predicted = model.predict(model.process.add_noise(latents, noise, t), t, cond)
    loss = (predicted - model.process.target(latents, noise, t)).square().mean((1, 2, 3))
    assert loss.max() < 1e-8


def test_sdxl_time_ids_are_pixels_in_this_order():
    xl, sd1 = tiny.model("sdxl"), tiny.model("sd1")
    assert xl.time_ids((1024, 768), (16, 32), (896, 640)).tolist() == [1024, 768, 16, 32, 896, 640]
    assert sd1.time_ids((1, 2), (3, 4), (5, 6)) is None
    with pytest.raises(ValueError, match="needs time_ids"):
        xl.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]), xl.encode_prompts(["a"]))


@torch.no_grad()
def test_sdxl_sizes_enter_as_sinusoids_after_the_pooled_text():
    """The input of add_embedding: pooled text, then cos and sin of each of the six numbers, by hand."""
    model = tiny.model("sdxl")
    seen = []
    model.unet.add_embedding.linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cond = model.encode_prompts(["a"])
    ids = model.time_ids((64, 72), (0, 8), (64, 64))
    model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]), cond, ids[None])
    half = 8  # of a width of 16
    angles = ids[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
    expected = torch.cat([cond.pooled_BP[0], torch.cat([angles.cos(), angles.sin()], 1).flatten()])
    torch.testing.assert_close(seen[0][0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "warned"), [
    ("noobaiXLNAIXL_vPred10Version", True), ("some-v-prediction", True), ("vpred", True), ("average", False),
])  # fmt: skip
def test_a_name_that_means_v_is_warned_of_unless_something_is_said(name, warned):
    process, told = process_of(NoiseFacts(), SDXL, False, name)
    assert bool(told) == warned and process.prediction == "epsilon"
    assert not warned or ("model_v_pred" in told[0] and "model_zero_terminal_snr" in told[0])
    assert not process_of(NoiseFacts("v_prediction"), SDXL, False, name)[1]
    assert not process_of(NoiseFacts(), SDXL, True, name)[1]
