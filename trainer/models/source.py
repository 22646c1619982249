"""What a file, a folder or a live host yields before modules are built: named tensors and what is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .noise import NoiseFacts
from .tokenizer import Vocabulary


@dataclass
class Source:
    """Tensors of a model by part: `unet`, `te1`, `te2` and `vae`, in diffusers (text: transformers 5) spelling.

    `configs`: configurations a diffusers folder brings, by part; what is not there is inferred from shapes.
    `vocabularies`: the folder's own, by part. `open_clip`: the text encoders that came in OpenCLIP's spelling.
    """

    name: str
    parts: dict[str, dict[str, Tensor]]
    noise: NoiseFacts = field(default_factory=NoiseFacts)
    path: Path | None = None
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    open_clip: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
