"""The Tucker option: convolution kernels above 1×1 as a small core between two 1×1 matrices."""

from __future__ import annotations

from dataclasses import dataclass

from ..params.field import param


@dataclass(frozen=True)
class TuckerOptions:
    """What types with a Tucker form of their convolutions share."""

    network_tucker: bool = param(
        False,
        "Split the kernels of 3x3 convolutions into a small core and two matrices (Tucker): a smaller file.",
        "option",
        needs="tucker",
    )
