"""Text: tokens as CLIP's, the layer each family reads, padding, chunks, pooled vectors, gradients."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import tiny
import torch
from ldm_names import TOKENS, WINDOW
from torch.nn import functional

from trainer.errors import ModelError
from trainer.models import tokenizer
from trainer.models.base import Conditioning
from trainer.models.family import PAD_EOS, PAD_ZERO
from trainer.models.load import load_model
from trainer.models.tokenizer import Tokenizer, Vocabulary, find_vocabulary, read_vocabulary

PROMPTS = [
    "",
    "a cat",
    "A  photo of an astronaut's horse, 3d;\n«naïve» café 🙂 don't we'll 42km",
    "日本語 ẞtraße İstanbul",
]


def clip_text(tensors, prefix: str, ids_NL, activation) -> list[torch.Tensor]:
    """CLIP's text tower from its definition, in transformers' names: what enters layer 0, 1, …, and what leaves the
    last."""
    get = lambda name: tensors[f"{prefix}{name}"]  # noqa: E731
    linear = lambda x, name: functional.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))  # noqa: E731
    norm = lambda x, name: functional.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)  # noqa: E731
    x = get("embeddings.token_embedding.weight")[ids_NL] + get("embeddings.position_embedding.weight")
    states = [x]
    n, length, width = x.shape
    future = torch.full((length, length), -math.inf).triu(1)
    for i in range(sum(name.startswith(f"{prefix}encoder.layers.") and name.endswith("fc1.bias") for name in tensors)):
        p = f"encoder.layers.{i}"
        y = norm(x, f"{p}.layer_norm1")
        q, k, v = (linear(y, f"{p}.self_attn.{w}_proj").view(n, length, -1, 64).transpose(1, 2) for w in "qkv")
        attended = ((q @ k.transpose(-1, -2) / 8 + future).softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        x = x + linear(attended, f"{p}.self_attn.out_proj")
        x = x + linear(activation(linear(norm(x, f"{p}.layer_norm2"), f"{p}.mlp.fc1")), f"{p}.mlp.fc2")
        states.append(x)
    return states


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def rows(encoder, *prompts):
    return torch.tensor([encoder.tokenizer.chunks(prompt, WINDOW)[0] for prompt in prompts])


@pytest.fixture(scope="module")
def models():
    return {kind: tiny.model(kind) for kind in tiny.KINDS}


def final(tensors, prefix, x):
    return functional.layer_norm(
        x, x.shape[-1:], tensors[f"{prefix}final_layer_norm.weight"], tensors[f"{prefix}final_layer_norm.bias"]
    )


@torch.no_grad()
def test_sd1_reads_the_last_layer_or_the_one_asked_for(models):
    prefix, tensors = "cond_stage_model.transformer.text_model.", tiny.checkpoint("sd1")
    states = clip_text(tensors, prefix, rows(models["sd1"].text_encoders[0], "a ring", ""), quick_gelu)
    for skip in (1, 2):
        expected = final(tensors, prefix, states[-skip])
        torch.testing.assert_close(
            models["sd1"].encode_prompts(["a ring", ""], skip).context_BLD, expected, atol=2e-5, rtol=1e-4
        )
    with pytest.raises(ModelError, match="clip skip 3: .* use 1 to 2"):
        models["sd1"].encode_prompts(["a"], 3)


@torch.no_grad()
def test_sd2_reads_the_penultimate_layer_of_its_file(models):
    tensors = tiny.checkpoint("sd2")
    spelled = tiny.converted_text(tensors, "open_clip", "cond_stage_model.model.", 64, 3)
    states = clip_text(spelled, "text_model.", rows(models["sd2"].text_encoders[0], "a ring"), functional.gelu)
    assert len(states) == 4
    expected = final(spelled, "text_model.", states[-2])
    torch.testing.assert_close(models["sd2"].encode_prompts(["a ring"]).context_BLD, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_sdxl_joins_two_penultimate_layers_and_pools_the_end_of_text(models):
    model, tensors = models["sdxl"], tiny.checkpoint("sdxl")
    prefix = "conditioner.embedders.0.transformer.text_model."
    ids = rows(model.text_encoders[0], "a ring")
    small = clip_text(tensors, prefix, ids, quick_gelu)[-2]
    spelled = tiny.converted_text(tensors, "open_clip", "conditioner.embedders.1.model.", 128, 3)
    other = rows(model.text_encoders[1], "a ring")
    states = clip_text(spelled, "text_model.", other, functional.gelu)
    end = final(spelled, "text_model.", states[-1])[0, len("aring") + 1]
    for skip in (1, 2):
        found = model.encode_prompts(["a ring"], skip)
        torch.testing.assert_close(found.context_BLD, torch.cat([small, states[-2]], -1), atol=2e-5, rtol=1e-4)
        projection = tensors["conditioner.embedders.1.model.text_projection"]
        torch.testing.assert_close(found.pooled_BP[0], end @ projection, atol=2e-5, rtol=1e-4)


def test_padding_is_the_families(models):
    first, second = (encoder.tokenizer.chunks("ab", WINDOW)[0] for encoder in models["sdxl"].text_encoders)
    a, b = tiny.token_ids()["a"], tiny.token_ids()["b</w>"]
    assert first == [TOKENS - 2, a, b, TOKENS - 1] + [TOKENS - 1] * (WINDOW - 4)
    assert second == [TOKENS - 2, a, b, TOKENS - 1] + [0] * (WINDOW - 4)
    assert models["sd1"].text_encoders[0].tokenizer.pad == TOKENS - 1
    assert models["sd2"].text_encoders[0].tokenizer.pad == 0


@torch.no_grad()
def test_long_prompts_are_chunks_each_with_start_and_end(models):
    model, room = models["sdxl"], WINDOW - 2
    long = "".join("abcde"[i % 5] for i in range(room + 20))
    assert model.token_count(long) == room + 20 and (model.chunk_count(long), model.chunk_count("")) == (2, 1)
    both = model.encode_prompts([long, "dog"])
    assert both.context_BLD.shape == (2, 2 * WINDOW, 192)
    dog, empty = model.encode_prompts(["dog"]), model.encode_prompts([""])
    torch.testing.assert_close(both.context_BLD[1], torch.cat([dog.context_BLD, empty.context_BLD], 1)[0])
    torch.testing.assert_close(both.pooled_BP[1], dog.pooled_BP[0])
    first = model.text_encoders[0].tokenizer.chunks(long, WINDOW)
    assert [len(row) for row in first] == [WINDOW, WINDOW]
    assert first[0][0] == first[1][0] == TOKENS - 2 and first[0][-1] == TOKENS - 1 == first[1][21]
    assert first[0][1:-1] + first[1][1:21] == model.text_encoders[0].tokenizer.encode(long)
    torch.testing.assert_close(model.encode_prompts(["dog"], chunks=2).context_BLD, both.context_BLD[1:])


def test_gradients_reach_the_text_encoders_only_when_wanted(models):
    model = tiny.model("sdxl")
    assert not model.encode_prompts(["a"]).context_BLD.requires_grad
    weights = [e.transformer.encoder.layers[0].mlp.fc1.weight.requires_grad_(True) for e in model.text_encoders]
    cond = model.encode_prompts(["a", "b"])
    (cond.context_BLD.square().mean() + cond.pooled_BP.square().mean()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)
    with torch.no_grad():
        assert not model.encode_prompts(["a"]).context_BLD.requires_grad


def test_conditioning_rows():
    cond = Conditioning(torch.arange(24.0).view(3, 2, 4), torch.arange(6.0).view(3, 2))
    assert len(cond) == 3 and torch.equal(cond[1].context_BLD, cond.context_BLD[1:2])
    assert torch.equal(cond[[2, 0]].pooled_BP, cond.pooled_BP[[2, 0]]) and len(cond[1:]) == 2
    joined = Conditioning.cat([cond[:1], cond[1:]])
    assert torch.equal(joined.context_BLD, cond.context_BLD) and torch.equal(joined.pooled_BP, cond.pooled_BP)
    assert (
        cond[:1].expand(5).context_BLD.shape == (5, 2, 4)
        and cond.to(dtype=torch.float16).pooled_BP.dtype == torch.float16
    )
    with pytest.raises(ValueError, match="encode them together"):
        Conditioning.cat([cond, Conditioning(torch.zeros(1, 3, 4), torch.zeros(1, 2))])


# -------------------------------------------------------------------- vocabulary


@pytest.fixture(scope="module")
def packaged():
    try:
        return find_vocabulary()
    except ModelError:
        pytest.skip("open_clip_torch is not installed")


def test_the_packaged_vocabulary_is_clips(packaged, tmp_path):
    assert len(packaged.ids) == TOKENS and set(packaged.ids.values()) == set(range(TOKENS))
    known = {
        "!": 0,
        "!</w>": 256,
        "a</w>": 320,
        "photo</w>": 1125,
        "of</w>": 539,
        "astronaut</w>": 18376,
        "<|endoftext|>": 49407,
    }
    assert {token: packaged.ids[token] for token in known} == known
    clip = Tokenizer(packaged, PAD_EOS)
    assert clip.encode("a photo of an astronaut") == [320, 1125, 539, 550, 18376]


def test_tokens_agree_with_transformers(packaged, tmp_path):
    from transformers import CLIPTokenizer

    (tmp_path / "vocab.json").write_text(json.dumps(packaged.ids), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *map(" ".join, packaged.merges)])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(read_vocabulary(tmp_path), PAD_ZERO)
    for prompt in PROMPTS:
        assert ours.encode(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"], prompt


def test_vocabularies_are_found_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "_packaged", lambda: [])
    with pytest.raises(ModelError, match="pip install --no-deps open_clip_torch"):
        find_vocabulary([tmp_path / "nothing"])
    folder = tiny.vocabulary(tmp_path / "model" / "tokenizer")
    for place in (folder, folder.parent):
        assert find_vocabulary([tmp_path / "nothing", place]).ids == tiny.token_ids()
    one_file = tmp_path / "one"
    one_file.mkdir()
    content = {"model": {"vocab": tiny.token_ids(), "merges": ["a b</w>", ["c", "d"]]}}
    (one_file / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (one_file / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}), encoding="utf-8")
    found = find_vocabulary([one_file])
    assert found.merges == (("a", "b</w>"), ("c", "d")) and found.pad == "!"
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("version\nt h\nth e</w>\n")
    for place in (tmp_path, tmp_path / "bpe_simple_vocab_16e6.txt.gz"):
        found = find_vocabulary([place])
        assert len(found.ids) == 516 and found.ids["the</w>"] == 513
        assert Tokenizer(found, PAD_EOS).encode("The") == [513]


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a CLIP vocabulary"):
        Tokenizer(Vocabulary({"a": 0}, ()), PAD_EOS)
    folder = tiny.folder("sd1", tmp_path / "model")
    ids = {**tiny.token_ids(), "<|endoftext|>": TOKENS + 5}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(ModelError, match=f"it knows {TOKENS} tokens, the vocabulary has {TOKENS + 6}"):
        load_model(folder)


def test_a_folders_own_padding_token_rules(tmp_path):
    folder = tiny.folder("sd1", tmp_path / "model")
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}), encoding="utf-8")
    assert load_model(folder).text_encoders[0].tokenizer.pad == 0
