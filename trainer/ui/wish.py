"""A picture that is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """One picture of a prompt: `size` is (height, width) in pixels, `lora` a name of the LoRA folder ("" for none) with
    its `strength`. The others say what it is drawn with where no WebUI draws.

    `model` ("" for the loaded one), its `vae` and `te` where they are not its own, and as in a job its prediction type,
    its schedule and the layer of the text encoder; what the job of the LoRA says of these three comes first.
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
    vae: str = ""
    te: str = ""
    v_pred: bool = False
    zero_snr: bool = False
    clip_skip: int = 1
