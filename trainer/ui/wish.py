"""A picture that is asked for."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """One picture of a prompt: `size` is (height, width) in pixels, `lora` a name of the LoRA folder ("" for none) with
    its `strength`, `model` what is drawn with where no WebUI draws ("" for the loaded one).
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    size: tuple[int, int] = (512, 512)
    steps: int = 20
    cfg: float = 7.0
    lora: str = ""
    strength: float = 1.0
    model: str = ""
