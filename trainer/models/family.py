"""What a model family is: the facts that the shapes of its tensors cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..maths.process import V_PREDICTION
from ..registry import Registry

PAD_EOS, PAD_ZERO = "eos", "zero"


@dataclass(frozen=True)
class TextRow:
    """One text encoder of a family.

    `part`: te1 or te2. `kohya`: prefix of its LoRA keys. `clip`: what ComfyUI and Forge call it. `prefixes`: where
    single files keep it, transformers' and OpenCLIP's spelling. `folder`: its folder in a diffusers model.
    `activation`: of its feed-forward layers. `pad`: what fills a short prompt, eos or zero. `least_skip`: the layer the
    UNet was trained on, counted from the end (1 last, 2 penultimate). `final_norm`: the final LayerNorm is applied to
    that layer. `pooled`: its projected end-of-text vector goes to the UNet. `drop_last`: the last layer of an OpenCLIP
    tower is never used and is left out, as diffusers does.
    """

    part: str
    kohya: str
    clip: str
    prefixes: tuple[str, ...]
    folder: str
    activation: str
    pad: str
    least_skip: int = 1
    final_norm: bool = True
    pooled: bool = False
    drop_last: bool = False

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer in a diffusers model."""
        return self.folder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class UnetFacts:
    """What tells families apart: linear projections around the attention, size conditioning, which text encoders there
    are."""

    linear: bool
    sizes: bool
    encoders: Collection[str]


@dataclass(frozen=True)
class Family:
    """An architecture row. `base_version` and `v_base_version` are kohya's names for ε- and v-prediction; `blocks`
    are the names by which users choose parts of it."""

    name: str
    label: str
    base_version: str
    v_base_version: str
    key_style: str
    latent_scale: float
    texts: tuple[TextRow, ...]
    sizes: bool
    matches: Callable[[UnetFacts], bool]
    blocks: tuple[str, ...]
    often_v: bool = False

    def version_for(self, prediction: str) -> str:
        """The base version of its models with this prediction type."""
        return {V_PREDICTION: self.v_base_version}.get(prediction, self.base_version)


def unet_blocks(count: int) -> tuple[str, ...]:
    """BASE (the text encoders), the input blocks, the middle block and the output blocks of a UNet in LDM order."""
    return ("BASE", *(f"IN{n:02d}" for n in range(count)), "M00", *(f"OUT{n:02d}" for n in range(count)))


FAMILIES: Registry[Family] = Registry("architecture", "models.families")
