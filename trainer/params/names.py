"""The closed lists of names that parameters choose from."""

from __future__ import annotations

BLOCKS = (
    "BASE",
    *(f"IN{index:02}" for index in range(12)),
    "M00",
    *(f"OUT{index:02}" for index in range(12)),
)
"""BASE is the text encoder; the others are the UNet blocks in LDM order. SDXL has the first nine IN and OUT."""

OPTIMIZERS = (
    "AdamW", "AdamW8bit", "AdaFactor", "Lion", "Prodigy", "DadaptAdam", "DadaptLion", "DAdaptAdaGrad", "DAdaptAdan",
    "DAdaptSGD", "Adam8bit", "SGDNesterov8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit", "RAdamScheduleFree",
    "AdamWScheduleFree", "SGDScheduleFree", "CAME", "Tiger", "AdamMini", "PagedAdamW", "PagedAdamW32bit", "SGDNesterov",
    "Adam",
)  # fmt: skip

LEARNING_RATE_ONE = ("Prodigy", "DadaptAdam", "DadaptLion", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptSGD")
"""Optimizers that find the learning rate themselves and want about 1.0 as theirs."""

SCHEDULERS = (
    "cosine_annealing", "cosine_annealing_with_restarts", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "constant", "constant_with_warmup", "piecewise_constant", "exponential", "step", "multi_step", "reduce_on_plateau",
    "cyclic", "one_cycle",
)  # fmt: skip

LOSSES = ("MSE", "L1", "Smooth-L1")
LOSS_WEIGHTINGS = ("none", "debiased", "velocity")
ELEMENTS = ("Full", "CrossAttention", "SelfAttention")
PRECISIONS = ("fp32", "bf16", "fp16")
MODEL_PRECISIONS = ("model", "fp32", "bf16", "fp16", "int8")
VAE_PRECISIONS = ("model", "fp32", "bf16", "fp16")
SAVE_PRECISIONS = ("model", "fp32", "bf16", "fp16")
