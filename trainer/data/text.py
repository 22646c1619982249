"""Text outputs, encoded once: for runs that do not train the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..errors import DataError
from .cache import TensorCache, Tensors, fingerprint

Progress = Callable[[str, int, int], None]
EncodeText = Callable[[str], Mapping[str, torch.Tensor]]


class TextOutputs:
    """What the text encoder makes of prompts, each encoded once and kept in the cache.

    `encode` turns a prompt into named tensors with a leading batch axis of 1, for example `context_1LD` and
    `pooled_1P`: each by itself, so that its bits do not depend on which others are in the cache. `encoder` identifies
    the text encoder's weights and precision, `clip_skip` the layer that is read.
    """

    def __init__(self, cache: TensorCache, encode: EncodeText, encoder: str, clip_skip: int = 1) -> None:
        self._cache = cache
        self._encode = encode
        self._facts = {"kind": "text, cut at commas", "encoder": encoder, "clip_skip": clip_skip}

    def prepare(self, prompts: Iterable[str], progress: Progress | None = None) -> int:
        """Encodes the prompts that are not in the cache (and the empty one, for padding); returns how many that were.

        Raises DataError when an output is not finite.
        """
        missing = [prompt for prompt in dict.fromkeys(("", *prompts)) if self._cache.get(self._key(prompt)) is None]
        for done, prompt in enumerate(missing):
            if progress:
                progress("encoding captions", done, len(missing))
            self._make(prompt)
        if progress and missing:
            progress("encoding captions", len(missing), len(missing))
        return len(missing)

    def outputs(self, prompts: Sequence[str]) -> Tensors:
        """The outputs for a batch of prompts: name → tensor with the batch axis first, float32 on the CPU.

        Rows of different length are brought to the longest with the output of the empty prompt, chunk by chunk: what
        an encoder that works in chunks gives for the padded prompt itself. Raises DataError when that is impossible.
        """
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.cat(self._same_length(name, [row[name] for row in rows])) for name in rows[0]}

    def _same_length(self, name: str, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        if len({part.shape for part in parts}) == 1:
            return parts
        longest = max(part.shape[1] for part in parts)
        empty_1LD = self._row("")[name]
        padded = []
        for part in parts:
            chunks, rest = divmod(longest - part.shape[1], empty_1LD.shape[1])
            if rest:
                raise DataError(
                    f"The text outputs of {part.shape[1]} and {longest} tokens cannot share a batch. "
                    "Set train_batch_size = 1."
                )
            padded.append(torch.cat([part, *[empty_1LD] * chunks], dim=1))
        return padded

    def _row(self, prompt: str) -> Tensors:
        row = self._cache.get(self._key(prompt))
        return self._make(prompt) if row is None else row

    def _make(self, prompt: str) -> Tensors:
        with torch.no_grad():
            made = {name: tensor.detach().float().cpu() for name, tensor in self._encode(prompt).items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in made.values()):
            raise DataError(
                f"The text encoder's output for {prompt!r} is not finite. Set train_model_precision = fp32 or bf16."
            )
        self._cache.put(self._key(prompt), made)
        return made

    def _key(self, prompt: str) -> str:
        return fingerprint(**self._facts, prompt=prompt)
