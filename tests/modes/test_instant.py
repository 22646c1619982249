"""The instant map: closed forms against their defining equations, files against ΔW, words against what they became."""

from __future__ import annotations

import dataclasses

import engine_case
import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters.file import read_lora
from trainer.engine.build import make_network
from trainer.engine.catalogue import catalogue
from trainer.engine.run import Request, run
from trainer.errors import AdapterError, JobError
from trainer.events import EventLog, Note
from trainer.maths import concept
from trainer.models.load import load_model
from trainer.modes.instant import Instant
from trainer.params.codec import load

INSTANT = {
    "format": 1,
    "mode": "Instant",
    "original prompt": "red\na red box",
    "target prompt": "blue\na blue box",
    "instant_preserve": "green\na cat",
    "instant_ridge": 0.003,
    "data_cache": "memory",
    "save_precision": "fp32",
    "train_model_precision": "fp32",
    "save_overwrite": True,
}
TRAINED = {
    **INSTANT, "mode": "iLECO", "network_init": "instant", "network_element": "CrossAttention", "network_rank": 12,
    "train_seed": 1, "train_iterations": 1, "image_size(height, width)": 64,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_estimate")


def rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ closed forms


def test_uce_solves_its_normal_equations():
    edited, wanted, kept, weight = rows(5, 32, 1), rows(5, 32, 2), rows(40, 32, 3), rows(16, 32, 4)
    ridge = 0.7
    gram = edited.T @ edited + kept.T @ kept + ridge * torch.eye(32, dtype=torch.float64)
    # Equation 7 of 2308.14761 as printed, columns for embeddings: (V*·Cᵀ + W·P·Pᵀ + λW)·M⁻¹
    printed = (weight @ wanted.T @ edited + weight @ kept.T @ kept + ridge * weight) @ torch.linalg.inv(gram)
    ours = weight @ (wanted - edited).T @ concept.balanced(edited, kept, ridge)
    assert torch.allclose(weight + ours, printed, atol=1e-11)


def test_uce_is_the_minimum_of_its_loss():
    edited, wanted, kept, weight = rows(3, 12, 1), rows(3, 12, 2), rows(6, 12, 3), rows(4, 12, 4)
    change = weight @ (wanted - edited).T @ concept.balanced(edited, kept, 0.5)
    change.requires_grad_(True)
    new = weight + change
    loss = (edited @ new.T - wanted @ weight.T).square().sum() + (kept @ change.T).square().sum()
    (loss + 0.5 * change.square().sum()).backward()
    assert change.grad.abs().max() < 1e-10


def test_speed_leaves_preserved_rows_unchanged_to_rounding_and_moves_the_rest():
    edited, wanted, kept, weight = rows(4, 48, 1), rows(4, 48, 2), rows(20, 48, 3), rows(8, 48, 4)
    kept = torch.cat([kept, kept[:5] * 2])  # copies must not disturb
    change = weight @ (wanted - edited).T @ concept.constrained(edited, kept, 1e-9)
    assert (kept @ change.T).abs().max() < 1e-11 * weight.abs().max() * 48
    assert torch.allclose(edited @ (weight + change).T, wanted @ weight.T, atol=1e-6)
    assert concept.constrained(edited, kept, 1.0).norm() < concept.constrained(edited, kept, 1e-9).norm()


def test_preserved_rows_are_chosen_by_how_far_they_would_move():
    kept = torch.cat([rows(30, 16, 5), rows(1, 16, 5) * 3])
    moved = torch.arange(31.0)
    chosen = concept.most_moved(kept, moved, 8)
    assert torch.linalg.matrix_rank(kept[chosen]) == 8
    assert chosen.tolist() == [0, 23, 24, 25, 26, 27, 28, 29, 30]  # row 0 lies in the span of row 30
    assert concept.most_moved(kept[:6], moved[:6], 8).tolist() == list(range(6))


def test_a_smaller_rank_is_the_best_there_is():
    up, down, seen = rows(10, 6, 1), rows(6, 20, 2), rows(50, 20, 3)
    short_up, short_down, share = concept.at_rank(up, down, seen, 2)
    assert short_up.shape == (10, 2) and short_down.shape == (2, 20)
    whole = up @ down @ seen.T
    values = torch.linalg.svdvals(whole)
    error = (short_up.double() @ short_down.double() @ seen.T - whole).square().sum()
    assert float(error) == pytest.approx(float(values[2:].square().sum()), rel=1e-4)  # Eckart–Young
    assert share == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-6)
    assert concept.at_rank(up, down, seen, 6)[0] is up


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ([5], [6], [(1, 1), (2, 2)]),
        ([1, 5, 9], [1, 6, 9], [(2, 2), (3, 3), (4, 4)]),
        ([1, 5, 9], [1, 9], [(2, 2), (3, 2), (4, 3)]),  # "a red box" → "a box"
        ([1, 9], [1, 6, 9], [(2, 3), (3, 4)]),
        ([7, 5], [6], [(1, 1), (2, 1), (3, 2)]),
        ([5, 9], [], [(1, 1), (2, 1), (3, 1)]),  # removed: everything becomes the end of the empty prompt
        ([1, 5], [1], [(2, 1), (3, 2)]),
        ([5], [5], []),
    ],
)
def test_words_are_paired_from_the_end(own, other, expected):
    assert concept.partners(own, other) == expected


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def case(request, tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("instant"), request.param)


@pytest.fixture(scope="module")
def model(case):
    return load_model(case.model)


@pytest.fixture
def sd1(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("sd1"))


def start(case, model, *listeners, **changes):
    job = load({**INSTANT, "model": str(case.model), **changes}, catalogue()).job
    return job, run(Request(job, case.places, model=model), EventLog(*listeners))


def context(model, prompt):
    with torch.no_grad():
        return model.encode_prompts([prompt]).context_BLD[0].double()


def embeddings(model, prompt):
    """Start, words, end, mean of the padding: read off the context by counting letters (each is a token here)."""
    whole, words = context(model, prompt), len(prompt.replace(" ", ""))
    return torch.cat([whole[: words + 2], whole[words + 2 :].mean(0, keepdim=True)])


def file_delta(path, key):
    tensors, _ = read_lora(path)
    up, down = tensors[f"{key}.lora_up.weight"].double(), tensors[f"{key}.lora_down.weight"].double()
    return up @ down * float(tensors[f"{key}.alpha"]) / down.shape[0]


def by_hand(model, layer, method):
    """ΔW of the two lines, from the paper's equation and the prompts' embeddings."""
    red, blue = embeddings(model, "red"), embeddings(model, "blue")
    first, second = embeddings(model, "a red box"), embeddings(model, "a blue box")
    # r e d ← l u e (from the end), end, padding; then the letters after "a", of which the target has one more
    edited = torch.cat([red[1:], first[2:]])
    wanted = torch.cat([blue[2:], second[3:]])
    kept = torch.cat([embeddings(model, p) for p in ("", "blue", "a blue box", "", "green", "a cat")])
    ridge = 0.003 * edited.square().sum(1).mean()
    weight = layer.weight.detach().double()
    eye = torch.eye(edited.shape[1], dtype=torch.float64)
    if method == "uce":
        return weight @ (wanted - edited).T @ edited @ torch.linalg.inv(edited.T @ edited + kept.T @ kept + ridge * eye)
    free = edited @ (eye - torch.linalg.pinv(kept, rtol=1e-6) @ kept)
    return weight @ (wanted - edited).T @ free @ torch.linalg.inv(free.T @ free + ridge * eye)


def edited_layers(model):
    """Module by key, spelled by the rule of each family."""
    return {a.key: a.module for a in make_network(JOB(model), model, 0, EventLog())}


def JOB(model):
    return load({**INSTANT, "model": str(model.path)}, catalogue()).job


def test_the_file_is_the_closed_form(case, model):
    trace = engine_case.Trace()
    _, result = start(case, model, trace, save_lora_name="uce")
    layers = edited_layers(model)
    assert len(layers) == 2 * sum(name.endswith("attn2") for name, _ in model.unet.named_modules())
    tensors = load_file(result.path)
    assert {key.split(".")[0] for key in tensors} == set(layers)
    assert all(t.shape[0] == 5 + 8 for key, t in tensors.items() if key.endswith("lora_down.weight"))
    for key in (min(layers), max(layers)):
        expected = by_hand(model, layers[key], "uce")
        assert torch.allclose(file_delta(result.path, key), expected, atol=1e-5 * float(expected.abs().max()))
        assert expected.abs().max() > 1e-4
    notes = [event.text for event in trace.events if isinstance(event, Note)]
    assert any("13 embeddings edited" in text and text.endswith(" s.") for text in notes)
    assert any("The run took" in text for text in notes)


def test_words_mean_what_they_were_told_and_the_rest_stays(case, model):
    """Through the attached adapter: keys of the edited words become those of the target, preserved ones do not move."""
    for method in ("uce", "speed"):
        job, result = start(case, model, save_lora_name=method, instant_method=method, instant_ridge=1e-5)
        network = make_network(job, model, 0, EventLog())
        network.load(read_lora(result.path)[0])
        layer = next(adapter.module for adapter in network)
        words = {p: embeddings(model, p).float() for p in ("red", "blue", "green", "a cat", "")}
        before = {prompt: layer(x) for prompt, x in words.items()}
        with network.attached():
            after = {prompt: layer(x) for prompt, x in words.items()}
        gap = (before["red"][3:] - before["blue"][4:]).norm()
        assert (after["red"][3:] - before["blue"][4:]).norm() < (0.5 if method == "uce" else 1.0) * gap
        if method == "speed":
            for prompt in ("blue", "green", "a cat", ""):
                assert (after[prompt] - before[prompt]).abs().max() < 2e-4 * before[prompt].abs().max(), prompt


def test_the_file_on_top_of_the_model_is_the_model_with_merged_weights(case, model):
    """Read again, as anyone reads it, against ΔW by hand added to the weights: the same prediction."""
    job, result = start(case, model, save_lora_name="merged")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t, ids = torch.tensor([700]), model.time_ids((64, 64), (0, 0), (64, 64))

    def predict():
        with torch.no_grad():
            return model.predict(x, t, model.encode_prompts(["a red box"]), ids)

    bare = predict()
    network = make_network(job, model, 0, EventLog())
    network.load(read_lora(result.path)[0])
    with network.attached():
        attached = predict()
    layers = edited_layers(model)
    kept = {layer: layer.weight.detach().clone() for layer in layers.values()}
    with torch.no_grad():
        for layer in kept:
            layer.weight += by_hand(model, layer, "uce").to(layer.weight)
        merged = predict()
        for layer, weight in kept.items():
            layer.weight.copy_(weight)
    assert (attached - merged).abs().max() < 1e-4 * (merged - bare).abs().max() > 0


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_two_words_change_places(sd1, method):
    """A target that is itself an original is not preserved: it could not change then."""
    swap = {"original prompt": "red\nblue", "target prompt": "blue\nred", "instant_ridge": 1e-5}
    model = load_model(sd1.model)
    _, result = start(sd1, model, instant_method=method, instant_preserve="green", save_lora_name="swap", **swap)
    layer = next(iter(edited_layers(model).values()))
    weight = layer.weight.double()
    moved = weight + file_delta(result.path, next(iter(edited_layers(model))))
    for own, other in (("red", "blue"), ("blue", "red")):
        old, new = embeddings(model, own)[-1], embeddings(model, other)[-1]
        assert ((old @ moved.T) - new @ weight.T).norm() < 0.5 * ((old - new) @ weight.T).norm(), own


def test_what_is_preserved_by_default():
    def asked(original):
        job = load({**INSTANT, "original prompt": original, "target prompt": "", "instant_preserve": ""}, catalogue())
        return Instant(job.job).prompts()

    everything = asked("xyz")
    assert everything[0] == "" and len(everything) > 20 and {"a photo", "a person", "red"} <= set(everything)
    assert set(everything) - set(asked("A Cat, red")) == {"a cat", "red"}
    assert Instant(load({**INSTANT}, catalogue()).job).prompts() == ("", "green", "a cat")


def test_it_starts_a_training_and_nothing_is_lost(case, model):
    """With room for every embedding the adapter begins exactly where the instant file ends; the rest can learn."""
    job = load({**TRAINED, "network_rank": 16, "network_alpha": 4, "model": str(case.model)}, catalogue()).job
    session = engine_case.session(case, job, model)
    session.network.eject()
    layers = edited_layers(model)
    for key, adapter in session.network.adapters.items():
        if key in layers:
            expected = by_hand(model, layers[key], "uce")
            assert torch.allclose(adapter.delta().double(), expected, atol=1e-4 * float(expected.abs().max()))
            assert adapter.down[13:].norm() > 0 and not adapter.up[:, 13:].any()
        else:
            assert not adapter.delta().any()


def test_a_start_in_a_smaller_rank_says_what_is_kept(sd1):
    trace = engine_case.Trace()
    case = dataclasses.replace(sd1)
    job = load({**TRAINED, "network_rank": 2, "model": str(case.model), "save_lora_name": "short"}, catalogue()).job
    result = run(Request(job, case.places), EventLog(trace))
    assert result.reason == "done"
    notes = [event.text for event in trace.events if isinstance(event, Note)]
    (told,) = [text for text in notes if "do not fit into the rank" in text]
    assert 10 < float(told.split("at least ")[1].split("%")[0]) < 100


def test_more_embeddings_than_dimensions_are_exact_too(sd1):
    originals = [f"w{chr(97 + n)}q{chr(122 - n)}" for n in range(18)]
    changes = {"original prompt": "\n".join(originals), "target prompt": "", "save_lora_name": "many"}
    model = load_model(sd1.model)
    _, result = start(sd1, model, instant_preserve="green", **changes)
    tensors = load_file(result.path)
    assert {t.shape[0] for key, t in tensors.items() if key.endswith("lora_down.weight")} == {64}
    red = embeddings(model, originals[0])
    layer = next(iter(edited_layers(model).values()))
    key = next(iter(edited_layers(model)))
    moved = red @ (layer.weight.double() + file_delta(result.path, key)).T
    target = embeddings(model, "")[-1] @ layer.weight.double().T
    assert (moved[-1] - target).norm() < 0.5 * (red[-1] @ layer.weight.double().T - target).norm()


# --------------------------------------------------------------------------------------------------------- bad input


def problems(**changes):
    with pytest.raises(JobError) as caught:
        load({**INSTANT, **changes}, catalogue())
    return {problem.field: problem.message for problem in caught.value.problems}


def test_bad_input_is_told_at_its_field():
    assert "empty line" in problems(**{"original prompt": "red\n\nbox", "target prompt": "a\nb\nc"})["original prompt"]
    assert "cannot both change and stay" in problems(instant_preserve="green\nred")["instant_preserve"]
    assert "has 1 line(s)" in problems(**{"target prompt": "blue"})["target prompt"]
    told = problems(mode="LoRA", lora_data_directory="x", network_init="instant")
    assert "needs an original and a target prompt" in told["network_init"]


def test_what_concerns_steps_is_hidden_and_harmless():
    given = {
        **INSTANT,
        "train_learning_rate": 0,
        "network_rank": 8,
        "train_optimizer": "AdamW8bit",
        "train_seed": 7,
        "network_init": "lora_ga",
        "network_max_norm": 1,
    }
    loaded = load(given, catalogue())
    for name in given.keys() - INSTANT.keys():
        assert any(line.startswith(f"{name} has no effect in mode Instant") for line in loaded.warnings)
    assert not any(line.startswith(("original", "instant", "save")) for line in loaded.warnings)


def test_prompts_beyond_the_window_are_refused_before_loading(sd1):
    for name in ("original prompt", "instant_preserve"):
        trace = engine_case.Trace()
        changes = {name: "y" * 90, "target prompt": "", "model": str(sd1.model)}
        job = load({**INSTANT, "original prompt": "red", **changes}, catalogue()).job
        with pytest.raises(JobError, match="90 tokens"):
            run(Request(job, sd1.places), EventLog(trace))
        assert not any("Loading" in event.text for event in trace.events if isinstance(event, Note))


def test_a_start_needs_a_plain_lora_on_cross_attention(sd1):
    job = load({**TRAINED, "network_element": "SelfAttention", "model": str(sd1.model)}, catalogue()).job
    with pytest.raises(AdapterError, match="network_element"):
        run(Request(job, sd1.places), EventLog())


def test_the_same_words_in_other_letters_are_noticed(sd1):
    job = load({**INSTANT, "original prompt": "Red", "target prompt": "red", "model": str(sd1.model)}, catalogue()).job
    with pytest.raises(JobError, match="reads the same"):
        run(Request(job, sd1.places), EventLog())
