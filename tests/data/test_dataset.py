"""From a folder to cached latents: what is encoded, when again, what is refused, what is told."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_pictures import PoolingEncoder, load_rgb, noise, write
from PIL import Image

from trainer.data.cache import TensorCache
from trainer.data.dataset import Dataset, SizeFacts, arrange, build
from trainer.data.scan import scan
from trainer.data.settings import ImageSettings
from trainer.errors import DataError

SMALL = {"size": (64, 64), "buckets_step": 64, "min_length": 64}
RANGE = {"size": (96, 64), "buckets_step": 16, "min_length": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of three shapes in the data folder."""
    data = tmp_path / "data"
    for number, size in enumerate([(64, 64), (96, 64), (64, 96), (100, 100)]):
        write(data / f"{number}.png", size, number, caption=f"picture {number}, tag")
    return data


def made(
    folder: Path, cache: TensorCache, encoder: PoolingEncoder | None = None, vae: str = "vae", **values: object
) -> Dataset:
    chosen = ImageSettings(folder=folder, **{**SMALL, **values})  # type: ignore[arg-type]
    return build(chosen, encoder or PoolingEncoder(), vae, cache)


def encoded(folder: Path, cache: TensorCache, **values: object) -> int:
    encoder = PoolingEncoder()
    made(folder, cache, encoder, **values)
    return encoder.pictures


def test_latents_are_those_of_the_picture(folder: Path) -> None:
    dataset = made(folder, TensorCache(None))
    mean_BCHW, std_BCHW = dataset.latents([0])
    rgb_CHW, _ = load_rgb(folder / "0.png")
    assert torch.equal(mean_BCHW[0], F.avg_pool2d(rgb_CHW, 8)) and mean_BCHW.shape == (1, 3, 8, 8)
    assert torch.equal(std_BCHW, torch.full_like(mean_BCHW, 0.5)) and mean_BCHW.dtype == torch.float32


def test_mirrored_latents(folder: Path) -> None:
    dataset = made(folder, TensorCache(None), mirroring=True)
    assert [item.flipped for item in dataset.items] == [False, True] * 4
    for even in range(0, 8, 2):
        mean_BCHW, _ = dataset.latents([even, even + 1])
        assert torch.allclose(mean_BCHW[1].flip(-1), mean_BCHW[0], rtol=0, atol=0.02)


def test_buckets_and_report(folder: Path) -> None:
    dataset = made(folder, TensorCache(None), **RANGE)
    assert [item.bucket for item in dataset.items] == [(64, 64), (96, 64), (64, 96), (64, 64)]
    assert dataset.bucket_report() == {"64x64": 2, "64x96": 1, "96x64": 1}
    assert dataset.latents([1])[0].shape == (1, 3, 8, 12)
    assert dataset.items[0].caption == "picture 0, tag"


def test_one_picture_gives_eight_items(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.png", (200, 200))
    encoder = PoolingEncoder()
    dataset = made(tmp_path / "data", TensorCache(None), encoder, **RANGE, sub_images=3, mirroring=True)
    assert len(dataset.items) == 8 and encoder.pictures == 8
    assert {len(batch) for batch in dataset.plan(0, 2).epoch(0)} == {2}


def test_multiply_and_repeats_encode_once(tmp_path: Path) -> None:
    write(tmp_path / "3_a" / "a.png", caption="red, circle")
    write(tmp_path / "2_b" / "b.png", seed=1, caption="red, ring")
    write(tmp_path / "2_b" / "c.png", seed=2)
    encoder = PoolingEncoder()
    dataset = made(tmp_path, TensorCache(None), encoder, multiply=2, trigger="shs")
    assert encoder.pictures == 3
    plan = dataset.plan(0, 4)
    assert Counter(index for batch in plan.epoch(0) for index in batch) == {0: 4, 1: 4, 2: 6}
    assert dataset.dataset_dirs() == {"2_b": {"n_repeats": 4, "img_count": 2}, "3_a": {"n_repeats": 6, "img_count": 1}}
    assert dataset.tag_frequency() == {"2_b": {"shs": 2, "red": 1, "ring": 1}, "3_a": {"shs": 1, "red": 1, "circle": 1}}
    assert dataset.all_captions() == ("shs, red, ring", "shs", "shs, red, circle")
    assert dataset.captions([1, 0]) == ("shs", "shs, red, ring")
    assert dataset.summary()["samples per epoch"] == 14


def test_batches_have_one_bucket(folder: Path) -> None:
    dataset = made(folder, TensorCache(None), **RANGE, mirroring=True, sub_images=2)
    plan = dataset.plan(5, 3)
    for number in range(2 * plan.batches_per_epoch):
        indices = plan.batch(number)
        mean_BCHW, _ = dataset.latents(indices)
        assert len(mean_BCHW) == len(indices) and len({item.target for item in dataset.sizes(indices)}) == 1


def test_sizes_for_sdxl(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (200, 101))
    dataset = made(tmp_path, TensorCache(None), mirroring=True)
    # 64/101 is the larger scale: 200 · 64/101 = 126.7 → 127 wide; (127 - 64) // 2 = 31, counted from the other side 32
    assert dataset.sizes([0, 1]) == (SizeFacts((101, 200), (0, 31), (64, 64)), SizeFacts((101, 200), (0, 32), (64, 64)))


def test_sizes_are_upright(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    noise((96, 64)).save(tmp_path / "a.jpg", exif=tags)
    dataset = made(tmp_path, TensorCache(None), **RANGE)
    assert dataset.items[0].bucket == (64, 96) and dataset.sizes([0])[0].original == (96, 64)


def test_mask_at_latent_size(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 20, 64))
    picture.save(tmp_path / "a.png")
    write(tmp_path / "b.png")
    dataset = made(tmp_path, TensorCache(tmp_path / "cache"), mirroring=True)
    mask_B1HW = dataset.mask([0, 1, 2])
    assert mask_B1HW is not None and mask_B1HW.shape == (3, 1, 8, 8)
    assert mask_B1HW[0, 0, 3].tolist() == [0, 0, 0.5, 1, 1, 1, 1, 1]
    assert torch.equal(mask_B1HW[1], mask_B1HW[0].flip(-1)) and bool((mask_B1HW[2] == 1).all())
    assert dataset.mask([2, 3]) is None
    again = made(tmp_path, TensorCache(tmp_path / "cache"), mirroring=True)
    assert torch.equal(again.mask([0, 1, 2]), mask_B1HW)  # type: ignore[arg-type]


def test_second_run_encodes_nothing(folder: Path, tmp_path: Path) -> None:
    first = made(folder, TensorCache(tmp_path / "cache"))
    again = made(folder, TensorCache(tmp_path / "cache"))
    assert (first.encoded, again.encoded) == (4, 0)
    assert torch.equal(first.latents([0, 3])[0], again.latents([0, 3])[0])
    assert first.fingerprint() == again.fingerprint()


def test_what_makes_it_encode_again(folder: Path, tmp_path: Path) -> None:
    def again(**values: object) -> int:
        return encoded(folder, TensorCache(tmp_path / "cache"), **values)

    assert again() == 4
    assert again(vae="other vae") == 4
    assert again(mirroring=True) == 4  # only the mirror images
    assert again(**RANGE) == 2  # the two that go to other buckets; the square ones keep theirs
    assert again(trigger="shs", multiply=3) == 0
    shutil.copy(folder / "3.png", folder / "0.png")
    assert again() == 0  # same contents as 3.png
    write(folder / "0.png", seed=99)
    assert again() == 1
    (folder / "1.png").rename(folder / "renamed.png")
    assert again() == 0


def test_swapped_contents_with_equal_size_and_time(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    for seed, name in enumerate(("a.bmp", "b.bmp")):
        write(data / name, seed=seed)
        os.utime(data / name, (1e9, 1e9))
    before = made(data, TensorCache(cache)).latents([0, 1])[0]
    (data / "a.bmp").rename(data / "c")
    (data / "b.bmp").rename(data / "a.bmp")
    (data / "c").rename(data / "b.bmp")
    after = made(data, TensorCache(cache))
    assert after.encoded == 0 and torch.equal(after.latents([1, 0])[0], before)


def test_damaged_entries_are_encoded_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = made(folder, TensorCache(cache)).latents([0, 3])[0]
    for number, path in enumerate(sorted(cache.glob("*.safetensors"))[:3]):
        data = path.read_bytes()
        path.write_bytes([b"", data[:-5], data[:-1] + bytes([data[-1] ^ 1])][number])
    encoder = PoolingEncoder()
    dataset = made(folder, TensorCache(cache), encoder)
    assert encoder.pictures == 3 and torch.equal(dataset.latents([0, 3])[0], before)
    assert encoded(folder, TensorCache(cache)) == 0


def test_entry_of_another_kind_is_encoded_again(folder: Path) -> None:
    cache = TensorCache(None)
    made(folder, cache)
    for key, tensors in cache._held.items():
        cache._held[key] = {**tensors, "mean": tensors["mean"][:, :1]}
    assert encoded(folder, cache) == 4


def test_interrupted_encoding_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_two(name: str, done: int, total: int) -> None:
        if name == "encoding images" and done == 2:
            raise Stop

    chosen = ImageSettings(folder=folder, **SMALL)  # type: ignore[arg-type]
    encoder = PoolingEncoder()
    with pytest.raises(Stop):
        build(chosen, encoder, "vae", TensorCache(tmp_path / "cache"), stop_after_two)
    assert encoder.pictures == 2
    assert encoded(folder, TensorCache(tmp_path / "cache")) == 2


def test_progress_is_told(folder: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    chosen = ImageSettings(folder=folder, **SMALL)  # type: ignore[arg-type]
    build(chosen, PoolingEncoder(), "vae", TensorCache(None), lambda *told: heard.append(told))
    assert heard == [("checking images", done, 4) for done in range(5)] + [
        ("encoding images", done, 4) for done in range(5)
    ]


def test_equal_pictures_are_encoded_once_and_each_by_itself(folder: Path) -> None:
    for number in range(5):
        shutil.copy(folder / "0.png", folder / f"copy{number}.png")
    encoder = PoolingEncoder()
    dataset = made(folder, TensorCache(None), encoder)
    assert encoder.shapes == [(1, 3, 64, 64)] * 4 and len(dataset.items) == 9


def test_no_gradient_and_no_random_draw(folder: Path) -> None:
    weight = torch.ones((), requires_grad=True)
    state = torch.get_rng_state()

    def encode(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_BCHW = F.avg_pool2d(pixels_BCHW, 8) * weight
        assert not mean_BCHW.requires_grad
        return mean_BCHW.half(), torch.ones_like(mean_BCHW).half()

    dataset = build(ImageSettings(folder=folder, **SMALL), encode, "vae", TensorCache(None))  # type: ignore[arg-type]
    assert dataset.latents([0])[0].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_truncated_pictures_stop_before_encoding(folder: Path) -> None:
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:3000])
    encoder = PoolingEncoder()
    with pytest.raises(DataError, match=r"2 of 4 images cannot be read: 1\.png \(.*\); 2\.png .*data_skip_broken"):
        made(folder, TensorCache(None), encoder)
    assert encoder.pictures == 0


def test_truncated_pictures_may_be_skipped(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    (folder / "4.png").touch()
    dataset = made(folder, TensorCache(None), skip_broken=True)
    assert [item.picture.name for item in dataset.items] == ["0.png", "2.png", "3.png"]
    summary = dataset.summary()
    assert summary["pictures"] == 3 and [str(line).split()[0] for line in summary["broken files"]] == ["4.png", "1.png"]  # type: ignore[attr-defined]
    assert dataset.latents([0, 1, 2])[0].shape == (3, 3, 8, 8)


def test_all_truncated(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="No other image is left"):
        made(folder, TensorCache(None), skip_broken=True)


def test_picture_that_changes_under_our_hands(folder: Path) -> None:
    def change(name: str, done: int, total: int) -> None:
        if name == "encoding images":
            write(folder / "0.png", seed=77)

    with pytest.raises(DataError, match=r"0\.png could be read a moment ago, but not now: it changed"):
        build(ImageSettings(folder=folder, **SMALL), PoolingEncoder(), "vae", TensorCache(None), change)  # type: ignore[arg-type]


def test_vae_that_fails(folder: Path) -> None:
    def poisoned(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_BCHW = F.avg_pool2d(pixels_BCHW, 8)
        return mean_BCHW * float("nan"), mean_BCHW

    chosen = ImageSettings(folder=folder, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"not finite for 0\.png.*train_VAE_precision"):
        build(chosen, poisoned, "vae", TensorCache(None))
    with pytest.raises(DataError, match="shape"):
        build(chosen, lambda pixels_BCHW: (pixels_BCHW[0], pixels_BCHW[0]), "vae", TensorCache(None))


def test_cache_that_vanishes_during_the_run(folder: Path, tmp_path: Path) -> None:
    dataset = made(folder, TensorCache(tmp_path / "cache", hold_bytes=0))
    assert dataset.latents([0])[0].shape == (1, 3, 8, 8)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"0\.png were removed or damaged"):
        dataset.latents([0])


def test_disable_upscale(folder: Path) -> None:
    write(folder / "tiny.png", (20, 20))
    dataset = made(folder, TensorCache(None), disable_upscale=True)
    assert [item.picture.name for item in dataset.items] == ["0.png", "1.png", "2.png", "3.png"]
    assert dataset.summary()["left out as too small"] == ["tiny.png"]
    assert made(folder, TensorCache(None)).summary()["enlarged images"] == 1
    with pytest.raises(DataError, match=r"All 5 images are smaller.*image_disable_upscale"):
        made(folder, TensorCache(None), disable_upscale=True, size=(128, 128))


def test_arrangement_before_encoding(folder: Path) -> None:
    chosen = ImageSettings(folder=folder, **RANGE)  # type: ignore[arg-type]
    found = scan(chosen)
    arrangement = arrange(found.pictures, chosen)
    dataset = build(chosen, PoolingEncoder(), "vae", TensorCache(None), scanned=found)
    assert arrangement.items == dataset.items and arrangement.bucket_report() == dataset.bucket_report()


def test_fingerprint_of_the_data(folder: Path) -> None:
    cache = TensorCache(None)
    plain = made(folder, cache).fingerprint()
    others = {
        made(folder, cache, **values).fingerprint()
        for values in ({"trigger": "x"}, {"multiply": 2}, {"mirroring": True})
    }
    assert len(others | {plain}) == 4


def test_nothing_told_or_kept_has_the_path(folder: Path, tmp_path: Path) -> None:
    dataset = made(folder, TensorCache(tmp_path / "cache"))
    told = f"{dataset.summary()} {dataset.dataset_dirs()} {dataset.tag_frequency()}"
    assert str(tmp_path) not in told
    for path in (tmp_path / "cache").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and "data" not in path.stem


def test_unicode_names(tmp_path: Path) -> None:
    for name in ("猫.png", "Käse mit Löchern.png", "emoji 🎨.png"):
        write(tmp_path / "写真" / name, seed=len(name), caption=name)
    dataset = made(tmp_path, TensorCache(tmp_path / "cache 🎨"))
    assert sorted(dataset.all_captions()) == sorted(["猫.png", "Käse mit Löchern.png", "emoji 🎨.png"])
    assert dataset.dataset_dirs() == {"写真": {"n_repeats": 1, "img_count": 3}}


def test_tiny_and_extreme_pictures(tmp_path: Path) -> None:
    for number, size in enumerate([(1, 1), (1, 300), (300, 1), (7, 5)]):
        write(tmp_path / f"{number}.png", size)
    dataset = made(tmp_path, TensorCache(None), **RANGE)
    assert all(np.isfinite(dataset.latents([index])[0].numpy()).all() for index in range(4))
