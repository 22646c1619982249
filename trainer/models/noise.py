"""Which prediction type and noise schedule a model has: read from what lies in the file and beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, brief
from ..jsontext import JsonError, read_bytes, read_object
from ..maths.alphas import scaled_linear_alphas, zero_terminal_snr
from ..maths.process import EPSILON, V_PREDICTION, Diffusion
from ..paths import is_file
from .family import Family

MOST_YAML = 1024 * 1024
MOST_STEPS = 10_000

_SPELLINGS = {
    "v": V_PREDICTION,
    "v_prediction": V_PREDICTION,
    "v-prediction": V_PREDICTION,
    "vpred": V_PREDICTION,
    "v_pred": V_PREDICTION,
    "eps": EPSILON,
    "epsilon": EPSILON,
}


@dataclass(frozen=True)
class NoiseFacts:
    """Prediction type (None = nothing was said), whether the schedule ends at zero signal, and ᾱ where the model brings
    its own."""

    prediction: str | None = None
    zero_snr: bool = False
    alphas_T: Tensor | None = None


def noise_of_file(names: Collection[str], metadata: Mapping[str, str], path: Path | None) -> NoiseFacts:
    """The facts of a single file, in order of trust: a yaml or json beside it, its `v_pred`/`ztsnr` keys, its modelspec
    metadata."""
    beside = _beside(path) if path is not None else None
    keys = V_PREDICTION if {"v_pred", "ztsnr"} & set(names) else None
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    return NoiseFacts(beside or keys or _SPELLINGS.get(said.lower()), "ztsnr" in names)


def noise_of_scheduler(config: Mapping[str, Any]) -> NoiseFacts:
    """The facts of a diffusers `scheduler_config.json`. Raises ModelError for a schedule that is not a diffusion of
    this kind."""
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in (EPSILON, V_PREDICTION):
        raise ModelError(
            f"scheduler_config.json: prediction_type {brief(prediction)}; epsilon and v_prediction are supported."
        )
    return NoiseFacts(prediction, bool(config.get("rescale_betas_zero_snr")), _alphas(config))


def _alphas(config: Mapping[str, Any]) -> Tensor:
    """ᾱ (T,) of diffusers' beta settings."""
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 < steps <= MOST_STEPS:
        raise ModelError(
            f"scheduler_config.json: num_train_timesteps {brief(steps)}; a whole number from 2 to {MOST_STEPS} is"
            " supported, and Stable Diffusion has 1000."
        )
    first, last = (_beta(config, name, usual) for name, usual in (("beta_start", 0.00085), ("beta_end", 0.012)))
    kind = config.get("beta_schedule", "scaled_linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(_betas(config["trained_betas"]), dtype=torch.float64)
    elif kind == "scaled_linear":
        return scaled_linear_alphas(first, last, steps)
    elif kind == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
    else:
        raise ModelError(
            f"scheduler_config.json: beta_schedule {brief(kind)}; scaled_linear, linear, trained_betas are supported."
        )
    return torch.cumprod(1 - betas, 0).float()


def _beta(config: Mapping[str, Any], name: str, usual: float) -> float:
    value = config.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelError(f"scheduler_config.json: {name} {brief(value)}; a number between 0 and 1 is right.")
    return float(value)


def _betas(given: object) -> list[float]:
    right = isinstance(given, list) and 1 < len(given) <= MOST_STEPS
    if not right or not all(type(beta) in (int, float) and 0 <= beta <= 1 for beta in given):  # type: ignore[attr-defined]
        raise ModelError(
            f"scheduler_config.json: trained_betas {brief(given)}; 2 to {MOST_STEPS} numbers from 0 to 1 are right."
        )
    return [float(beta) for beta in given]  # type: ignore[attr-defined]


NAMED_V = re.compile(r"v[-_ .]?pred|v[-_ .]?param", re.IGNORECASE)
"""How names of v-prediction models are spelt."""


def process_of(facts: NoiseFacts, family: Family, forced_v: bool, name: str = "") -> tuple[Diffusion, list[str]]:
    """(noise process, warnings). `forced_v` overrides what the model says; one that says nothing is taken for ε, also
    when its `name` means v, which is warned of.
    """
    warnings = []
    prediction = facts.prediction
    if prediction is None and not forced_v and NAMED_V.search(name):
        warnings.append(
            f"{name} is named like a v-prediction model but does not say so inside; ε is assumed. If it is one, set"
            " model_v_pred, and model_zero_terminal_snr if its schedule ends in pure noise."
        )
    elif prediction is None and family.often_v and not forced_v:
        warnings.append(
            f"{family.label}: the file does not say whether it predicts ε or v; ε is assumed. "
            "If it is a v-model (768 pixels), set model_v_pred or put its yaml beside it."
        )
    if forced_v and facts.prediction == EPSILON:
        warnings.append("model_v_pred is set although the model says that it predicts ε; v-prediction is used.")
    alphas = scaled_linear_alphas() if facts.alphas_T is None else facts.alphas_T
    process = Diffusion(
        zero_terminal_snr(alphas) if facts.zero_snr else alphas, V_PREDICTION if forced_v else prediction or EPSILON
    )
    return process, warnings


def _beside(path: Path) -> str | None:
    """What a yaml or json of the same stem says."""
    for suffix in (".yaml", ".yml"):
        config = path.with_suffix(suffix)
        if is_file(config):
            try:
                found = _of_yaml(read_bytes(config, MOST_YAML).decode("utf-8", "replace"))
            except JsonError as fault:
                raise ModelError(f"{config.name} beside {path.name} {fault}. Get it again, or remove it.") from fault
            if found:
                return found
    config = path.with_suffix(".json")
    if is_file(config):
        try:
            said = read_object(config)
        except JsonError:
            return None  # some other program's file: it may say nothing to us
        return _SPELLINGS.get(str(said.get("prediction_type", said.get("parameterization", "")))[:40].lower())
    return None


def _of_yaml(text: str) -> str | None:
    """What an LDM or sgm configuration says; an LDM one that is silent means ε, its default."""
    said = re.search(r"^\s*parameterization:\s*[\"']?([\w-]+)", text, re.MULTILINE)
    if said:
        return _SPELLINGS.get(said[1].lower())
    if re.search(r"denoiser_scaling\.VScaling", text):
        return V_PREDICTION
    return (
        EPSILON
        if re.search(r"denoiser_scaling\.EpsScaling|target:\s*\S*\.ddpm\.LatentDiffusion\s*$", text, re.MULTILINE)
        else None
    )
