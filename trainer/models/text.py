"""A text encoder with its tokenizer: token ids → what the UNet reads of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .family import TextRow
from .tokenizer import Tokenizer


class TextEncoder(nn.Module):
    """CLIP's text tower. `row` is its part in the family, `window` the number of positions."""

    def __init__(self, clip: Any, projection: nn.Linear | None, row: TextRow, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.clip, self.projection = clip, projection
        self.row, self.tokenizer = row, tokenizer
        self.window: int = clip.config.max_position_embeddings
        self.layers: int = clip.config.num_hidden_layers
        rows = clip.config.vocab_size
        if tokenizer.size > rows:
            raise ModelError(
                f"text encoder {row.part}: it knows {rows} tokens, the vocabulary has {tokenizer.size}. "
                "Give the vocabulary this model was made with (a folder with vocab.json and merges.txt)."
            )

    @property
    def transformer(self) -> Any:
        """The tower itself: transformers before 5 keeps it as `text_model` inside its CLIPTextModel."""
        return getattr(self.clip, "text_model", self.clip)

    def forward(self, ids_NL: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """(context (N, L, width), pooled (N, P) or None) of token rows. `clip_skip` 1 is the last layer, 2 the
        penultimate.

        The layer is never later than the one the UNet was trained on. Raises ModelError when there are fewer layers.
        """
        skip = max(clip_skip, self.row.least_skip)
        if not 1 <= skip <= self.layers:
            raise ModelError(
                f"clip skip {clip_skip}: text encoder {self.row.part} has {self.layers} layers; use 1 to {self.layers}."
            )
        out = self.clip(input_ids=ids_NL, output_hidden_states=True, return_dict=True)
        last = out.last_hidden_state  # the final LayerNorm is already applied to it
        hidden = last if skip == 1 else out.hidden_states[-skip]
        if skip > 1 and self.row.final_norm:
            hidden = self.transformer.final_layer_norm(hidden)
        return hidden, self._pooled(last, ids_NL) if self.row.pooled else None

    def _pooled(self, last_NLD: Tensor, ids_NL: Tensor) -> Tensor:
        """The projected vector at the first end-of-text token of each row."""
        end = (ids_NL == self.tokenizer.end).int().argmax(1)
        rows = last_NLD[torch.arange(len(ids_NL), device=ids_NL.device), end]
        return rows if self.projection is None else self.projection(rows)
