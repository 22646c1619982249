"""CLIP's byte-pair tokenizer from a vocabulary on this machine: nothing is downloaded.

The vocabulary is a folder (`vocab.json` + `merges.txt`, or `tokenizer.json`) or the `bpe_simple_vocab_16e6.txt.gz` that
the packages `open_clip_torch` and `clip` carry; those packages are read as files, never imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .family import PAD_EOS

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = 49408
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class Vocabulary:
    """Token → id, the merges in order of rank, and the padding token where the folder names one."""

    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...]
    pad: str | None = None


class Tokenizer:
    """Prompt → token ids, without start and end; `start`, `end` and `pad` are ids."""

    def __init__(self, vocabulary: Vocabulary, pad: str) -> None:
        missing = [token for token in (START, END) if token not in vocabulary.ids]
        if missing:
            raise ModelError(f"vocabulary: it has no {' and no '.join(missing)}; it is not a CLIP vocabulary.")
        self.start, self.end = vocabulary.ids[START], vocabulary.ids[END]
        self.size = max(vocabulary.ids.values()) + 1
        by_family = self.end if pad == PAD_EOS else 0
        self.pad = by_family if vocabulary.pad is None else vocabulary.ids.get(vocabulary.pad, by_family)
        self._bpe = _byte_pair_encoder(vocabulary)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self._bpe.encode(prompt, add_special_tokens=False).ids)

    def chunks(self, prompt: str, window: int) -> list[list[int]]:
        """Rows of exactly `window` ids, each start + at most window−2 tokens + end + padding; at least one row."""
        ids = self.encode(prompt)
        room = window - 2
        parts = [ids[at : at + room] for at in range(0, len(ids), room)] or [[]]
        return [self.row(part, window) for part in parts]

    def row(self, ids: Sequence[int], window: int) -> list[int]:
        """One row of `window` ids around at most window−2 tokens."""
        body = [self.start, *ids, self.end]
        return body + [self.pad] * (window - len(body))


def _byte_pair_encoder(vocabulary: Vocabulary) -> Any:
    """CLIP's encoder in the `tokenizers` library: NFC, one space, lower case, CLIP's word pattern, bytes, merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    model = models.BPE(
        vocab=vocabulary.ids,
        merges=list(vocabulary.merges),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    encoder = Tokenizer(model)
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return encoder


def find_vocabulary(places: Sequence[Path] = ()) -> Vocabulary:
    """The first vocabulary found in `places` (folders or BPE files), else in an installed package.

    Raises ModelError that names the places looked at and the command that installs one.
    """
    candidates = [*(Path(place) for place in places), *_packaged()]
    for place in candidates:
        found = read_vocabulary(place)
        if found is not None:
            return found
    looked = (
        ", ".join(str(place) for place in candidates) or "no folder, and neither open_clip_torch nor clip is installed"
    )
    raise ModelError(
        f"no CLIP vocabulary was found (looked at: {looked}). Give a folder with vocab.json and merges.txt, "
        "or install one as a file: pip install --no-deps open_clip_torch"
    )


def tokenizer_beside(path: Path, places: Sequence[Path] = ()) -> Tokenizer | None:
    """The tokenizer a model file or folder will be read with, found without loading it; None when there is none.

    Padding is not that of its family: it serves to count tokens.
    """
    try:
        own = read_vocabulary(path) if path.is_dir() else None
        return Tokenizer(own or find_vocabulary(places), PAD_EOS)
    except ModelError:
        return None  # loading will say what is missing


def read_vocabulary(place: Path) -> Vocabulary | None:
    """The vocabulary at `place`: a BPE file, or a folder with tokenizer files or with a `tokenizer` folder; None if
    none is there."""
    if place.is_file():
        return _from_bpe_file(place) if place.name.endswith(".gz") else None
    for folder in (place, place / "tokenizer"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = _merges(line for line in lines if not line.startswith("#version"))
            return Vocabulary(
                json.loads((folder / "vocab.json").read_text(encoding="utf-8")), merges, _pad_token(folder)
            )
        if (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
            return Vocabulary(model.get("vocab", {}), _merges(model.get("merges", ())), _pad_token(folder))
        if (folder / BPE_FILE).is_file():
            return _from_bpe_file(folder / BPE_FILE)
    return None


def _packaged() -> list[Path]:
    """Where installed packages carry the BPE file; they are located, not imported."""
    found = []
    for package in ("open_clip", "clip"):
        try:
            spec = importlib.util.find_spec(package)
        except ValueError:  # a host put a stand-in without a spec in its place
            continue
        folders = spec.submodule_search_locations if spec else None
        found += [Path(folder) / BPE_FILE for folder in folders or () if (Path(folder) / BPE_FILE).is_file()]
    return found


def _merges(lines: Any) -> tuple[tuple[str, str], ...]:
    pairs = (line.split() if isinstance(line, str) else line for line in lines if line)
    return tuple((pair[0], pair[1]) for pair in pairs)


def _pad_token(folder: Path) -> str | None:
    """The padding token that a tokenizer folder names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else str(token)
    return None


def _from_bpe_file(path: Path) -> Vocabulary:
    """CLIP's 49,408 tokens: 256 bytes, the same ending a word, one per merge, start and end."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = _merges(file.read().split("\n")[1 : CLIP_TOKENS - 2 * 256 - 2 + 1])
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return Vocabulary({token: index for index, token in enumerate(tokens)}, merges)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in CLIP's order: the printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
