"""torch's process-wide switches, as a run must leave them."""

from __future__ import annotations

import torch


def switches() -> dict[str, object]:
    """Every switch that hosts are known to set, as it stands."""
    cuda = torch.backends.cuda
    return {
        "tf32": cuda.matmul.fp32_precision, "fp16 sums": cuda.matmul.allow_fp16_accumulation,
        "cudnn tf32": torch.backends.cudnn.allow_tf32, "benchmark": torch.backends.cudnn.benchmark,
        "math sums": cuda.fp16_bf16_reduction_math_sdp_allowed(), "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(), "math": cuda.math_sdp_enabled(),
    }  # fmt: skip
