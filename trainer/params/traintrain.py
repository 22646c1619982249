"""How a settings file of TrainTrain is recognised, and which of them cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath

ODD_KEYS = ("image_size(height, width)", "network_blocks(BASE = TextEncoder)", "train_fixed_timsteps_in_batch")

DEFAULTS: Mapping[str, object] = {"logging_save_csv": False}
"""What a file of TrainTrain means by leaving a setting out or empty, where that is not our own default."""

Z_IMAGE = re.compile(r"(?<![a-z])z[-_ ]?image", re.IGNORECASE)
Z_IMAGE_TEXT_ENCODER = re.compile(r"(?<![a-z])qwen", re.IGNORECASE)


def is_traintrain(raw: Mapping[str, object]) -> bool:
    """Whether TrainTrain wrote this: one of its odd keys is there and no `format`, which our own files carry."""
    return "format" not in raw and any(key in raw for key in ODD_KEYS)


def z_image_key(raw: Mapping[str, object]) -> str:
    """The key that shows that a TrainTrain file was made for Z-Image (its model or text encoder), or "".

    TrainTrain writes no family into its settings; the names of the chosen files are all there is.
    """
    for key, pattern in (("model", Z_IMAGE), ("te", Z_IMAGE), ("te", Z_IMAGE_TEXT_ENCODER)):
        value = raw.get(key)
        if isinstance(value, str) and pattern.search(PureWindowsPath(value).name):
            return key
    return ""
