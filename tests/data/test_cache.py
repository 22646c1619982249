"""When the cache is believed, and when not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import writing
from trainer.data import cache as cache_module
from trainer.data.cache import TensorCache, fingerprint
from trainer.data.text import TextOutputs
from trainer.errors import DataError

KEY, OTHER = fingerprint(item=1), fingerprint(item=2)


def entry(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((4, 2, 3), value), "std": torch.ones(4, 2, 3)}


def file_of(folder: Path, key: str = KEY) -> Path:
    return folder / f"{key}.safetensors"


def test_round_trip_on_disk(tmp_path: Path) -> None:
    TensorCache(tmp_path).put(KEY, {"mean": torch.arange(24.0, dtype=torch.float64).reshape(4, 2, 3).transpose(0, 1)})
    got = TensorCache(tmp_path).get(KEY)
    assert got is not None and got["mean"].dtype == torch.float32
    assert torch.equal(got["mean"], torch.arange(24.0).reshape(4, 2, 3).transpose(0, 1))
    assert os.listdir(tmp_path) == [f"{KEY}.safetensors"]
    assert TensorCache(tmp_path).get(OTHER) is None


def test_memory_touches_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = TensorCache(None, hold_bytes=0)
    cache.put(KEY, entry())
    assert cache.get(KEY) is not None and cache.get(OTHER) is None
    assert not cache.on_disk and not os.listdir(tmp_path)


def test_fingerprint_depends_on_every_fact() -> None:
    assert fingerprint(a=1, b=(2, 3)) == fingerprint(b=[2, 3], a=1)
    assert (
        len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1"), fingerprint(a=1, b=None)}) == 5
    )


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_truncated_file_is_absent(tmp_path: Path, kept: int) -> None:
    TensorCache(tmp_path).put(KEY, entry())
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    assert TensorCache(tmp_path).get(KEY) is None


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    TensorCache(tmp_path).put(KEY, entry(1.5))
    path = file_of(tmp_path)
    good = path.read_bytes()
    for at in [*range(0, 8), *range(8, len(good), 7), len(good) - 1]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        got = TensorCache(tmp_path).get(KEY)
        # A byte of the header that means nothing (the version, padding) may differ; the tensors may not.
        assert got is None or torch.equal(got["mean"], entry(1.5)["mean"])


def test_swapped_files_are_absent(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, entry(1))
    cache.put(OTHER, entry(2))
    file_of(tmp_path).replace(tmp_path / "aside")
    file_of(tmp_path, OTHER).replace(file_of(tmp_path))
    (tmp_path / "aside").replace(file_of(tmp_path, OTHER))
    fresh = TensorCache(tmp_path)
    assert fresh.get(KEY) is None and fresh.get(OTHER) is None
    fresh.put(KEY, entry(1))
    assert torch.equal(TensorCache(tmp_path).get(KEY)["mean"], entry(1)["mean"])  # type: ignore[index]


def test_foreign_file_is_absent(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    save_file(entry(), file_of(tmp_path))  # no metadata
    assert cache.get(KEY) is None
    save_file(entry(), file_of(tmp_path), metadata={"fingerprint": KEY})  # no digest
    assert cache.get(KEY) is None
    file_of(tmp_path).write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert cache.get(KEY) is None


def test_forged_entry_with_nan_is_absent(tmp_path: Path) -> None:
    poisoned = {"mean": torch.full((4, 2, 3), float("nan"))}
    save_file(poisoned, file_of(tmp_path), metadata={"fingerprint": KEY, "digest": cache_module._digest(poisoned)})
    assert TensorCache(tmp_path).get(KEY) is None
    with pytest.raises(ValueError, match="finite"):
        TensorCache(tmp_path).put(KEY, poisoned)


def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.put(KEY, entry())
    assert not file_of(tmp_path).exists() and TensorCache(tmp_path).get(KEY) is None


def test_leftovers_of_dead_writers_are_removed_and_drafts_of_living_ones_stay(tmp_path: Path) -> None:
    dead, foreign = tmp_path / "0123-ab.tmp", tmp_path / "notes.txt"
    for path in (dead, foreign):
        path.write_bytes(b"half")
    with writing.draft(file_of(tmp_path)) as living:
        TensorCache(tmp_path)
        assert not dead.exists() and living.path.exists() and foreign.exists()


def test_what_a_full_disk_does_not_take_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    monkeypatch.setattr(os, "fsync", full)
    cache = TensorCache(tmp_path, hold_bytes=0, warn=told.append)
    for key, value in ((KEY, 1), (OTHER, 2)):
        cache.put(key, entry(value))
    assert torch.equal(cache.get(OTHER)["mean"], entry(2)["mean"])  # type: ignore[index]
    assert len(told) == 1 and "the disk is full" in told[0] and "data_cache = memory" in told[0]
    assert not os.listdir(tmp_path)


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    told: list[str] = []
    cache = TensorCache(tmp_path / "cache", warn=told.append)
    cache.put(KEY, entry())
    assert cache.get(KEY) is not None and len(told) == 1 and "cannot be written" in told[0]


def test_target_in_use_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorCache(tmp_path).put(KEY, entry())

    def in_use(source: Path, target: Path) -> None:
        raise PermissionError(13, "Access is denied")

    told: list[str] = []
    monkeypatch.setattr(os, "replace", in_use)
    monkeypatch.setattr(writing, "_PAUSE", 0)
    TensorCache(tmp_path, warn=told.append).put(KEY, entry())  # the same entry is there already
    assert not told
    TensorCache(tmp_path, warn=told.append).put(OTHER, entry())
    assert told and os.listdir(tmp_path) == [f"{KEY}.safetensors"]


def test_memory_limit_reads_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, hold_bytes=300)  # one entry has 2 · 24 · 4 = 192 bytes
    cache.put(KEY, entry(1))
    cache.put(OTHER, entry(2))
    file_of(tmp_path).unlink()
    assert cache.get(KEY) is not None  # held
    assert torch.equal(cache.get(OTHER)["mean"], entry(2)["mean"])  # type: ignore[index]
    file_of(tmp_path, OTHER).unlink()
    assert cache.get(OTHER) is None  # was not held


def test_writers_beside_each_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            TensorCache(tmp_path).put(KEY, entry(1))
            got = TensorCache(tmp_path).get(KEY)
            results.append(got is not None and bool((got["mean"] == 1).all()))

    results: list[bool] = []
    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(results)
    assert os.listdir(tmp_path) == [f"{KEY}.safetensors"]


class ChunkEncoder:
    """Encodes texts in chunks of 3 tokens: each chunk becomes 3 rows of its letters' codes, blanks where it ends."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, prompt: str) -> dict[str, torch.Tensor]:
        self.calls.append(prompt)
        return self.row(prompt)

    @staticmethod
    def row(prompt: str, chunks: int | None = None) -> dict[str, torch.Tensor]:
        count = chunks or max(1, -(-len(prompt) // 3))
        codes = torch.tensor([float(ord(letter)) for letter in prompt.ljust(3 * count)])
        return {"context": codes[None, :, None].expand(1, -1, 2), "pooled": codes[None, :1]}


def test_text_is_encoded_once(tmp_path: Path) -> None:
    encoder = ChunkEncoder()
    heard: list[tuple[str, int, int]] = []
    texts = TextOutputs(TensorCache(tmp_path), encoder, "weights-a", clip_skip=2)
    assert texts.prepare(["ab", "cd", "ab"], lambda *told: heard.append(told)) == 3
    assert encoder.calls == ["", "ab", "cd"]
    assert heard == [("encoding captions", done, 3) for done in range(4)]
    again = TextOutputs(TensorCache(tmp_path), encoder, "weights-a", clip_skip=2)
    assert again.prepare(["cd", "ab"]) == 0
    assert torch.equal(again.outputs(["cd", "ab"])["context"][:, 0, 0], torch.tensor([99.0, 97.0]))
    assert len(encoder.calls) == 3
    assert TextOutputs(TensorCache(tmp_path), encoder, "weights-a", clip_skip=1).prepare(["ab"]) == 2
    assert TextOutputs(TensorCache(tmp_path), encoder, "weights-b", clip_skip=2).prepare(["ab"]) == 2


def test_texts_of_different_length_share_a_batch() -> None:
    encoder = ChunkEncoder()
    outputs = TextOutputs(TensorCache(None), encoder, "weights").outputs(["a", "abcdefg", ""])
    expected = torch.cat([encoder.row(prompt, chunks=3)["context"] for prompt in ("a", "abcdefg", "")])
    assert torch.equal(outputs["context"], expected) and outputs["pooled"].shape == (3, 1)


def test_text_that_is_not_finite() -> None:
    row = {"context": torch.full((1, 3, 2), float("inf"))}
    texts = TextOutputs(TensorCache(None), lambda prompt: row, "weights")
    with pytest.raises(DataError, match="not finite"):
        texts.prepare(["a"])


def test_file_names_tell_nothing(tmp_path: Path) -> None:
    TextOutputs(TensorCache(tmp_path), ChunkEncoder(), "weights").prepare(["a secret prompt"])
    for name in os.listdir(tmp_path):
        assert len(name) == 64 + len(".safetensors") and "secret" not in name
        assert set(load_file(tmp_path / name)) == {"context", "pooled"}


def aged(folder: Path, ages: dict[str, float]) -> dict[str, Path]:
    """Entries of about 300 bytes each by name, used so many days ago."""
    cache, paths = TensorCache(folder), {}
    for name, days in ages.items():
        key = fingerprint(name=name)
        cache.put(key, entry())
        paths[name] = file_of(folder, key)
        os.utime(paths[name], (time.time() - days * 24 * 3600,) * 2)
    return paths


def test_entries_nobody_used_for_months_go(tmp_path: Path) -> None:
    paths = aged(tmp_path, {"old": 61, "kept": 59, "new": 0})
    other = tmp_path / "memory.json"
    other.write_text("{}", encoding="utf-8")
    os.utime(other, (0, 0))
    TensorCache(tmp_path)
    assert [name for name, path in paths.items() if path.exists()] == ["kept", "new"] and other.exists()


def test_above_the_limit_the_entries_used_longest_ago_go_and_never_those_of_today(tmp_path: Path) -> None:
    paths = aged(tmp_path, {"a": 9, "b": 5, "c": 7, "d": 0.9, "e": 0})
    size = paths["a"].stat().st_size
    assert TensorCache(tmp_path, keep_bytes=5 * size).get(fingerprint(name="a")) is not None, "nothing too much"
    TensorCache(tmp_path, keep_bytes=4 * size)
    assert [name for name, path in paths.items() if path.exists()] == ["a", "b", "d", "e"], "reading a used it"
    TensorCache(tmp_path, keep_bytes=1)
    assert [name for name, path in paths.items() if path.exists()] == ["a", "d", "e"]


def test_a_small_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = aged(tmp_path, {"a": 3, "b": 2})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    TensorCache(tmp_path)
    assert [name for name, path in paths.items() if path.exists()] == ["b"]


def test_several_runs_may_clear_at_once(tmp_path: Path) -> None:
    aged(tmp_path, {str(number): 100 for number in range(60)})
    failed: list[BaseException] = []

    def clear() -> None:
        try:
            TensorCache(tmp_path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=clear) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not list(tmp_path.glob("*.safetensors"))
