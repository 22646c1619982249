"""The painted world, its reader and the shipped tiny base model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trainer.demo import reader, world

SHIPPED = Path(world.__file__).parent / "base"
shipped = pytest.mark.skipif(not (SHIPPED / "unet" / "config.json").exists(), reason="the base is not trained yet")


def picture_of(seed: int, count: int = 20) -> tuple[list[world.Scene], np.ndarray]:
    rng = np.random.default_rng(seed)
    scenes = world.draw_scenes(count, rng, "all")
    return scenes, world.render(scenes, rng)


def test_same_seed_same_pictures() -> None:
    first, second, other = picture_of(1), picture_of(1), picture_of(2)
    assert first[0] == second[0] and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])
    assert first[1].shape == (20, 64, 64, 3) and first[1].dtype == np.uint8


def test_a_large_red_circle_is_where_the_caption_says() -> None:
    scene = world.Scene("circle", "red", "white", "large", "left")
    picture = world.render([scene], np.random.default_rng(0))[0].astype(int)
    assert np.abs(picture[32, 20] - (222, 38, 42)).max() <= 7 and np.abs(picture[32, 60] - 235).max() <= 7
    assert world.caption(scene) == "a large red circle on the left, white background"


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="colour is 'pink'"):
        world.Scene("circle", "pink", "white", "large", "left")
    with pytest.raises(ValueError, match="kind"):
        world.draw_scenes(1, np.random.default_rng(0), "some")
    with pytest.raises(ValueError, match="uint8"):
        reader.read(np.zeros((1, 32, 32, 3), np.uint8))


def test_captions() -> None:
    scene = world.Scene("ring", "blue", "grey", "small", "right")
    assert world.caption(scene, ()) == ""
    assert world.caption(scene, ("colour",)) == "a blue shape"
    assert world.caption(scene, template="background first") == "grey background, a small blue ring on the right"
    assert world.caption(scene, template="tags") == "blue ring, small, right, grey background"
    assert world.caption(scene, colour_word="flamingo") == "a small flamingo ring on the right, grey background"


def test_caption_dropping_rates() -> None:
    rng = np.random.default_rng(3)
    scenes = world.draw_scenes(4000, rng, "base")
    texts = [world.draw_caption(scene, rng) for scene in scenes]
    dropped_all = 0.1 + 0.9 * 0.3**5
    assert abs(np.mean([not text or text == "a shape" or text == "shape" for text in texts]) - dropped_all) < 0.02
    for name in world.ATTRIBUTES:
        kept = np.mean([getattr(s, name) in t.replace(",", "").split() for s, t in zip(scenes, texts, strict=True)])
        assert abs(kept - 0.9 * 0.7) < 0.03, name
    assert not any(word in text for text in texts for word in (world.HELD_OUT_COLOUR, world.HELD_OUT_SHAPE))


def test_the_unet_saw_at_most_60_percent_of_the_combinations() -> None:
    seen = [scene for scene in world.all_scenes(held_out=True) if world.in_base(scene)]
    assert len(seen) <= 0.6 * len(world.all_scenes()) == 0.6 * 5 * 6 * 3 * 2 * 2
    assert not any(scene.colour == world.HELD_OUT_COLOUR or scene.shape == world.HELD_OUT_SHAPE for scene in seen)
    places = Counter((scene.shape, scene.colour, scene.background) for scene in seen)
    assert len(places) == 90 and set(places.values()) == {2, 3}


def test_reader_on_clean_pictures() -> None:
    scenes, pictures = picture_of(4, 2000)
    assert reader.score(scenes, reader.read(pictures))["all"] >= 0.995


def test_reader_may_say_unreadable() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    empty = np.full((1, 64, 64, 3), 235, np.uint8)
    assert reader.read(noise)[0].shape is None
    plain = reader.read(empty)[0]
    assert plain.background == "white" and plain.shape is None and plain.colour is None and plain.side is None


def test_folder_of_pictures(tmp_path) -> None:
    scenes = world.draw_scenes(3, np.random.default_rng(1), "all")
    paths = world.write_folder(tmp_path, scenes, seed=5)
    assert [p.with_suffix(".txt").read_text().strip() for p in paths] == [world.caption(s) for s in scenes]


def test_shipped_concept_pictures() -> None:
    image = pytest.importorskip("PIL.Image")
    folder = SHIPPED.parent / "pictures"
    paths = sorted(folder.glob("*.png"))
    readings = reader.read(np.stack([np.array(image.open(path).convert("RGB")) for path in paths]))
    assert len(paths) == 12
    for path, reading in zip(paths, readings, strict=True):
        words = path.with_suffix(".txt").read_text(encoding="utf-8").replace(",", "").split()
        assert {getattr(reading, n) for n in world.ATTRIBUTES} <= set(words)
    assert all(reading.shape == world.HELD_OUT_SHAPE for reading in readings)
    for name in ("colour", "background", "size", "side"):
        assert len({getattr(reading, name) for reading in readings}) == {"colour": 6, "background": 3}.get(name, 2)


@shipped
def test_reader_on_round_trips_of_the_shipped_autoencoder() -> None:
    from trainer.demo import base_vae

    assert base_vae.round_trip_score(base_vae.load(SHIPPED), 600, seed=6)["all"] >= 0.995


@shipped
def test_scaled_latents_have_zero_mean_and_unit_variance() -> None:
    from trainer.demo import base_vae

    rng = np.random.default_rng(8)
    latents = base_vae.encode(base_vae.load(SHIPPED), world.render(world.draw_scenes(400, rng, "base"), rng))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


@shipped
def test_sizes_of_the_shipped_model() -> None:
    from safetensors import safe_open

    limits = {
        "unet/diffusion_pytorch_model.safetensors": 6e6,
        "vae/diffusion_pytorch_model.safetensors": 2.5e6,
        "text_encoder/model.safetensors": 1e6,
    }
    for name, limit in limits.items():
        with safe_open(SHIPPED / name, "pt") as file:
            tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
        assert sum(int(np.prod(t.get_shape())) for t in tensors) <= limit, name
        assert {t.get_dtype() for t in tensors} == {"F16"}, name
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 20e6


@shipped
def test_tokenizer_never_meets_an_unknown_word() -> None:
    from trainer.demo import base_text

    tokenizer = base_text.load_tokenizer(SHIPPED)
    assert tokenizer.model_max_length == 32
    assert tokenizer.tokenize("A large RED circle, white background") == [
        word + "</w>" for word in ("a", "large", "red", "circle", ",", "white", "background")
    ]
    pieces = tokenizer.tokenize(world.HELD_OUT_COLOUR)
    assert len(pieces) > 3 and "".join(pieces) == world.HELD_OUT_COLOUR + "</w>"
    for text in ("lozenge", "zürich 日本 42", "x_y-z!", "\U0001f600"):
        ids = tokenizer(text).input_ids[1:-1]
        assert ids and not {tokenizer.unk_token_id, tokenizer.bos_token_id} & set(ids), text


@shipped
def test_layout_is_sd1(tmp_path) -> None:
    unet, text = (json.loads((SHIPPED / part / "config.json").read_text()) for part in ("unet", "text_encoder"))
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet["attention_head_dim"] == 8 and unet["cross_attention_dim"] == text["hidden_size"] == 128
    assert text["hidden_act"] == "quick_gelu" and text["max_position_embeddings"] == 32
