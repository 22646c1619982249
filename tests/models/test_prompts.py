"""Long prompts are cut where A1111 cuts them, and escaped brackets are read as it reads them."""

from __future__ import annotations

from itertools import chain

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.models.tokenizer import BACKTRACK, Tokenizer, cut, read_vocabulary

COMMA, ROOM = 267, 75


def a1111s_chunks(ids):
    """Its loop over the tokens of a line, by what its source does with comma_padding_backtrack 20.

    A comma that finds the chunk full opens the next one and is forgotten; any other token looks back at most 20 places.
    """
    chunks, chunk, last_comma = [], [], -1
    for token in ids:
        if token == COMMA:
            last_comma = len(chunk)
        elif len(chunk) == ROOM and last_comma != -1 and len(chunk) - last_comma <= 20:
            moved = chunk[last_comma + 1 :]
            chunks.append(chunk[: last_comma + 1])
            chunk, last_comma = moved, -1
        if len(chunk) == ROOM:
            chunks.append(chunk)
            chunk, last_comma = [], -1
        chunk.append(token)
    if chunk or not chunks:
        chunks.append(chunk)
    return chunks


TOKENS = st.lists(st.sampled_from([COMMA, *range(1, 12)]), max_size=400)


@settings(max_examples=400, deadline=None)
@given(TOKENS | st.lists(st.sampled_from([COMMA, 1]), max_size=200) | st.lists(st.just(1), max_size=200))
def test_parts_are_a1111s(ids):
    found = cut(ids, ROOM, COMMA)
    assert found == a1111s_chunks(ids)
    assert list(chain(*found)) == ids and all(len(part) <= ROOM for part in found)


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.integers(1, 30))
def test_small_windows_lose_nothing_and_go_on(ids, room):
    found = cut(ids, room, COMMA)
    assert list(chain(*found)) == ids and all(0 < len(part) <= room for part in found) == bool(ids)


@pytest.mark.parametrize(("at", "length"), [(54, 75), (55, 56), (74, 75), (75, 75)])
def test_by_hand(at, length):
    """The last comma of a long line at a place: 20 tokens before the end is near enough, one at the cut opens anew."""
    ids = [1] * 100
    ids[at] = COMMA
    assert len(cut(ids, ROOM, COMMA)[0]) == length and BACKTRACK == 20


def test_a_caption_goes_through_the_tokenizer(tmp_path):
    tiny.vocabulary(tmp_path / "vocabulary.txt.gz")
    tokenizer = Tokenizer(read_vocabulary(tmp_path / "vocabulary.txt.gz"), "eos")
    (comma,) = tokenizer.encode(",")
    words = "a " * 60 + ", " + "b " * 30
    first, second = tokenizer.chunks(words, 77)
    assert len(first) == len(second) == 77 and first[61] == comma and first[62] == tokenizer.end


@pytest.mark.parametrize(("written", "read"), [
    (r"hatsune miku \(vocaloid\)", "hatsune miku (vocaloid)"), (r"a \[b\] \\", "a [b] \\"), (r"a\b", r"a\b"),
])  # fmt: skip
def test_escaped_brackets(tmp_path, written, read):
    tiny.vocabulary(tmp_path / "vocabulary.txt.gz")
    tokenizer = Tokenizer(read_vocabulary(tmp_path / "vocabulary.txt.gz"), "eos")
    assert tokenizer.encode(written) == tokenizer._bpe.encode(read, add_special_tokens=False).ids
