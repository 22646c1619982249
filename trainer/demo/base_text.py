"""The text side of the tiny base model: a byte-level CLIP tokenizer and a small CLIPTextModel, trained by a proxy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import base_common as common
from . import world

WEIGHTS = "model.safetensors"
LENGTH = 32  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"
EXTRA_WORDS = ("of", "picture", "with")
BUDGET = common.Budget(steps=400, batch=96, rate=1.5e-3)


def byte_units() -> list[str]:
    """The 256 printable characters that stand for the byte values, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return [chr(value) for value in printable] + [chr(256 + n) for n in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Merges that make every word of the world one token, letter by letter from the left; held-out words get none."""
    known = [w for w in world.words() if w not in (world.HELD_OUT_COLOUR, world.HELD_OUT_SHAPE)]
    result: dict[tuple[str, str], None] = {}
    for word in sorted({*known, *EXTRA_WORDS}):
        units = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(units)):
            result["".join(units[:end]), units[end]] = None
    return list(result)


def write_tokenizer(folder: Path) -> None:
    """Write the four files of the tokenizer into `folder`/tokenizer."""
    folder, units, pairs = Path(folder) / "tokenizer", byte_units(), merges()
    vocabulary = [*units, *(unit + "</w>" for unit in units), *dict.fromkeys(a + b for a, b in pairs), START, END]
    common.write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    common.write_json(folder / "special_tokens_map.json", special)
    common.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": LENGTH,
            "do_lower_case": True,
            "errors": "replace",
            "add_prefix_space": False,
            **special,
        },
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a diffusers folder."""
    return CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh text encoder: ids `B x 32` to states `B x 32 x 128`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def load(folder: Path) -> CLIPTextModel:
    """The trained text encoder of a diffusers folder in float32, frozen."""
    model = CLIPTextModel.from_pretrained(Path(folder) / "text_encoder", torch_dtype=torch.float32)
    return model.eval().requires_grad_(False)


def to_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids `B x 32`, padded with the end token as in SD1."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode(model: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], batch: int = 256) -> torch.Tensor:
    """States after the last layer and its norm (clip skip 1), `N x 32 x 128`."""
    parts = [model(to_ids(tokenizer, captions[i : i + batch]))[0] for i in range(0, len(captions), batch)]
    return torch.cat(parts)


class Proxy(nn.Module):
    """The text encoder with linear heads: attributes from the end token and the mean state, tokens from all states."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text = text
        width = text.config.hidden_size
        sizes = [len(world.SHAPES) + 1, len(world.COLOURS) + 1, len(world.BACKGROUNDS) + 1, 3, 3]
        self.heads = nn.ModuleList([nn.Linear(width, size) for size in sizes * 2])
        self.token = nn.Linear(width, text.config.vocab_size)

    def forward(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Attribute logits (five from the end token, five from the mean) and token logits, for ids `B x 32`."""
        states = self.text(ids)[0]
        end = (ids == self.text.config.eos_token_id).int().argmax(dim=1)
        pooled = [states[torch.arange(len(ids)), end], states.mean(dim=1)]
        half = len(self.heads) // 2
        logits = [head(pooled[n // half]) for n, head in enumerate(self.heads)]
        return logits, self.token(states)


def attribute_targets(captions: list[str]) -> torch.Tensor:
    """For each caption the index of the value it names for each attribute, 0 where it names none; `N x 5`."""
    values = (world.SHAPES, tuple(world.COLOURS), tuple(world.BACKGROUNDS), tuple(world.SIZES), tuple(world.SIDES))
    rows = []
    for text in captions:
        named = set(text.replace(",", " ").split())
        rows.append([next((n + 1 for n, word in enumerate(group) if word in named), 0) for group in values])
    return torch.tensor(rows)


def proxy_loss(proxy: Proxy, tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[torch.Tensor, float]:
    """Cross-entropy of attributes and of the tokens themselves, and the share of right attributes."""
    ids, targets = to_ids(tokenizer, captions), attribute_targets(captions)
    logits, tokens = proxy(ids)
    losses = [nn.functional.cross_entropy(row, targets[:, n % 5]) for n, row in enumerate(logits)]
    right = np.mean([(row.argmax(1) == targets[:, n % 5]).float().mean().item() for n, row in enumerate(logits)])
    return sum(losses) + nn.functional.cross_entropy(tokens.flatten(0, 1), ids.flatten()), float(right)


def draw_captions(count: int, rng: np.random.Generator) -> list[str]:
    """Captions as the UNet sees them, with more random words."""
    return [
        world.draw_caption(scene, rng, drop_all=0.05, nonsense=0.5)
        for scene in world.draw_scenes(count, rng, kind="open")
    ]


def train(work: Path, budget: common.Budget = BUDGET, seed: int = 2) -> None:
    """Train or continue the text encoder in `work`; the finished part lies in `work/base/text_encoder`."""
    write_tokenizer(work / "base")
    tokenizer = load_tokenizer(work / "base")
    torch.manual_seed(seed)
    proxy = Proxy(build(tokenizer))

    def loss_at(step: int) -> torch.Tensor:
        rng, _ = common.step_rng(seed, step)
        return proxy_loss(proxy, tokenizer, draw_captions(budget.batch, rng))[0]

    @torch.no_grad()
    def on_save(step: int) -> None:
        proxy.eval()
        right = proxy_loss(proxy, tokenizer, draw_captions(500, np.random.default_rng(seed + 1)))[1]
        print(f"text step {step} right attributes {right:.4f}", flush=True)

    common.train("text", proxy, loss_at, budget, work / "text.pt", on_save)
    write(proxy.text, work / "base")


def write(text: CLIPTextModel, folder: Path) -> None:
    """Export the text encoder to `folder`/text_encoder under SD1's tensor names, which every transformers reads."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "projection_dim",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "layer_norm_eps",
        "attention_dropout",
        "initializer_factor",
        "initializer_range",
    )
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "float16",
        **{name: getattr(text.config, name) for name in names},
    }
    prefix = "" if next(iter(text.state_dict())).startswith("text_model.") else "text_model."
    common.export(text, folder / "text_encoder", WEIGHTS, config, prefix)
