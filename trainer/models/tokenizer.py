"""CLIP's byte-pair tokenizer from a vocabulary on this machine: nothing is downloaded.

The vocabulary is a folder (`vocab.json` + `merges.txt`, or `tokenizer.json`) or the `bpe_simple_vocab_16e6.txt.gz` that
the packages `open_clip_torch` and `clip` carry; those packages are read as files, never imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, brief, pip_install
from ..jsontext import MOST_BYTES, JsonError, read_bytes, read_object
from ..paths import is_dir, is_file
from .family import PAD_EOS

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = 49408
MOST_TOKENS, MOST_LETTERS = 1_000_000, 200
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BACKTRACK = 20
"""How far A1111 looks back for a comma to cut a long prompt at (its option comma_padding_backtrack as installed)."""
ESCAPED = re.compile(r"\\([\\()\[\]])")
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
        self._comma = vocabulary.ids.get(",</w>", -1)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt; brackets and backslashes behind a backslash are read without it, as WebUIs do."""
        return list(self._bpe.encode(ESCAPED.sub(r"\1", prompt), add_special_tokens=False).ids)

    def chunks(self, prompt: str, window: int) -> list[list[int]]:
        """Rows of exactly `window` ids, each start + at most window−2 tokens + end + padding; at least one row.

        A long prompt is cut where A1111 cuts it, see `cut`.
        """
        return [self.row(part, window) for part in cut(self.encode(prompt), window - 2, self._comma)]

    def row(self, ids: Sequence[int], window: int) -> list[int]:
        """One row of `window` ids around at most window−2 tokens."""
        body = [self.start, *ids, self.end]
        return body + [self.pad] * (window - len(body))


def cut(ids: Sequence[int], room: int, comma: int) -> list[list[int]]:
    """Token ids in parts of at most `room`, at least one. Where a part would end within BACKTRACK tokens after a comma,
    it ends with that comma and what follows moves on, unless the next token is a comma itself.
    """
    parts, at = [], 0
    while at < len(ids):
        end = at + room
        if end < len(ids) and ids[end] != comma:
            near = range(max(end - BACKTRACK, at + 1), end)
            end = next((place + 1 for place in reversed(near) if ids[place] == comma), end)
        parts.append(list(ids[at:end]))
        at = end
    return parts or [[]]


def _byte_pair_encoder(vocabulary: Vocabulary) -> Any:
    """CLIP's encoder in the `tokenizers` library: NFC, one space, lower case, CLIP's word pattern, bytes, merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        model = models.BPE(
            vocab=vocabulary.ids,
            merges=list(vocabulary.merges),
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    except Exception as error:  # the library raises plain exceptions
        raise ModelError(f"vocabulary: it cannot be used ({brief(str(error))}). Get its files again.") from error
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
        f"or install one as a file: {pip_install('--no-deps', 'open_clip_torch')}"
    )


def tokenizer_beside(path: Path, places: Sequence[Path] = ()) -> Tokenizer | None:
    """The tokenizer a model file or folder will be read with, found without loading it; None when there is none.

    Padding is not that of its family: it serves to count tokens.
    """
    try:
        own = read_vocabulary(path) if is_dir(path) else None
        return Tokenizer(own or find_vocabulary(places), PAD_EOS)
    except ModelError:
        return None  # loading will say what is missing


def read_vocabulary(place: Path) -> Vocabulary | None:
    """The vocabulary at `place`: a BPE file, or a folder with tokenizer files or with a `tokenizer` folder; None if
    none is there. Raises ModelError when one is there that cannot be used."""
    if is_file(place):
        return _from_bpe_file(place) if place.name.endswith(".gz") else None
    for folder in (place, place / "tokenizer"):
        if is_file(folder / "vocab.json") and is_file(folder / "merges.txt"):
            lines = _text(folder / "merges.txt").splitlines()
            merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            return _vocabulary(_object(folder / "vocab.json"), merges, _pad_token(folder), folder)
        if is_file(folder / "tokenizer.json"):
            model = _object(folder / "tokenizer.json").get("model")
            model = model if isinstance(model, dict) else {}
            pairs = [line.split() if isinstance(line, str) else line for line in _list(model.get("merges"))]
            return _vocabulary(model.get("vocab"), pairs, _pad_token(folder), folder)
        if is_file(folder / BPE_FILE):
            return _from_bpe_file(folder / BPE_FILE)
    return None


def _vocabulary(ids: object, merges: Sequence[object], pad: str | None, folder: Path) -> Vocabulary:
    """A vocabulary out of what files hold. Raises ModelError when it cannot be one."""
    right = isinstance(ids, dict) and 0 < len(ids) <= MOST_TOKENS
    if not right or not all(type(number) is int and 0 <= number < MOST_TOKENS for number in ids.values()):  # type: ignore[attr-defined]
        raise ModelError(
            f"{folder}: its vocabulary has to give each token a number from 0 to {MOST_TOKENS - 1}. Get the file again."
        )
    pairs = [pair for pair in merges if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(merges) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ModelError(f"{folder}: its merges are not pairs of tokens throughout. Get the file again.")
    return Vocabulary(ids, tuple((first, second) for first, second in pairs), pad)  # type: ignore[arg-type]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _object(path: Path) -> dict[str, object]:
    """The JSON object in a file of a tokenizer. Raises ModelError."""
    try:
        return read_object(path)
    except JsonError as fault:
        raise ModelError(f"{path}: this file {fault}. Is the download complete? Get it again.") from fault


def _text(path: Path) -> str:
    """The text in a file of a tokenizer. Raises ModelError."""
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8")
    except (JsonError, UnicodeDecodeError) as fault:
        what = "is not text in UTF-8" if isinstance(fault, UnicodeDecodeError) else fault
        raise ModelError(f"{path}: this file {what}. Is the download complete? Get it again.") from fault


def _packaged() -> list[Path]:
    """Where installed packages carry the BPE file; they are located, not imported."""
    found = []
    for package in ("open_clip", "clip"):
        try:
            spec = importlib.util.find_spec(package)
        except ValueError:  # a host put a stand-in without a spec in its place
            continue
        folders = spec.submodule_search_locations if spec else None
        found += [Path(folder) / BPE_FILE for folder in folders or () if is_file(Path(folder) / BPE_FILE)]
    return found


def _pad_token(folder: Path) -> str | None:
    """The padding token that a tokenizer folder names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if is_file(folder / name):
            token = _object(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return str(token)[:MOST_LETTERS]
    return None


def _from_bpe_file(path: Path) -> Vocabulary:
    """CLIP's 49,408 tokens: 256 bytes, the same ending a word, one per merge, start and end. Raises ModelError."""
    try:
        with gzip.open(path) as file:
            text = file.read(MOST_BYTES).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as fault:
        raise ModelError(f"{path}: this vocabulary cannot be read ({fault}). Install its package again.") from fault
    pairs = [line.split() for line in text.split("\n")[1 : CLIP_TOKENS - 2 * 256 - 2 + 1] if line]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs), START, END]
    return _vocabulary({token: index for index, token in enumerate(tokens)}, pairs, None, path)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in CLIP's order: the printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
