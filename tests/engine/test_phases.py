"""Which part of the model is on the device when, told by a stand-in for the device that notes what was brought."""

from __future__ import annotations

from collections.abc import Iterator

import engine_case
import pair_case
import pytest
import torch

from trainer.engine.devices import TILE, Visit, decode, picture_encoder, settle, using
from trainer.engine.samples import SampleSettings, sample
from trainer.events import EventLog, Note, Sampled
from trainer.models import base
from trainer.models.base import Model
from trainer.models.load import load_model

pytestmark = pytest.mark.usefixtures("no_estimate")


class Card:
    """Parts are on it when they were brought there and not taken off. `seen`: every use, with what was there then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[int, str] = {}
        self.held: list[object] = []
        self.there: set[int] = set()
        self.seen: list[tuple[str, tuple[str, ...]]] = []
        monkeypatch.setattr(Model, "is_here", lambda model, part: id(part) in self.there)
        monkeypatch.setattr(Model, "bring", lambda model, part: self.there.add(self.known(model, part)))
        monkeypatch.setattr(Model, "go_home", lambda model, part: self.there.discard(id(part)))
        for use in ("encode_images", "encode_prompts", "predict", "decode"):
            monkeypatch.setattr(Model, use, self.watched(use, getattr(Model, use)))

    def forget(self) -> None:
        self.seen.clear()
        self.there.clear()

    def known(self, model: Model, part: object) -> int:
        texts = [encoder.row.part for encoder in model.text_encoders]
        for name, one in zip(("unet", *texts, "vae"), model.parts, strict=True):
            self.names[id(one)] = name
        self.held.append(part)  # no other part may get its number
        return id(part)

    def watched(self, use, own):
        def call(model: Model, *args, **kwargs):
            there = tuple(sorted(self.names[part] for part in self.there))
            if (use, there) not in self.seen:
                self.seen.append((use, there))
            return own(model, *args, **kwargs)

        return call


@pytest.fixture
def card(monkeypatch) -> Iterator[Card]:
    return Card(monkeypatch)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return engine_case.make(tmp_path_factory.mktemp("phases"))


PICTURES = [("encode_images", ("vae",)), ("encode_prompts", ("te1",)), ("predict", ("unet",))]


def test_each_phase_has_only_the_part_that_it_uses(case, card) -> None:
    settings = {"train_iterations": 2, "network_targets": "unet", "sample_prompts": "a red circle", "sample_every": 2}
    stages = {"prior_loss_weight": 1.0, "prior_states": 2, "lalora_lambda": 1.0, "abm_enabled": True, "abm_steps": 1}
    drawn: list[Sampled] = []
    case.run(
        lambda event: drawn.append(event) if isinstance(event, Sampled) else None,
        **settings, **stages, sample_steps=2, data_cache="memory", save_lora_name="phases",
    )  # fmt: skip
    assert len(drawn) == 1
    assert card.seen == [*PICTURES, ("decode", ("vae",))]
    assert {card.names[part] for part in card.there} == {"unet"}  # back after the preview, for the next step


def test_a_text_encoder_that_is_trained_stays_beside_the_unet(case, card) -> None:
    case.run(
        train_iterations=2, network_targets="both", sample_prompts="a red circle", sample_every=1, sample_steps=1,
        data_cache="memory", save_lora_name="texts",
    )  # fmt: skip
    both = ("te1", "unet")
    assert card.seen == [("encode_images", ("vae",)), ("encode_prompts", both), ("predict", both), ("decode", ("vae",))]


def test_whoever_finds_everything_in_the_cache_brings_only_the_unet(case, card) -> None:
    settings = {"train_iterations": 1, "network_targets": "unet", "data_cache": "disk"}
    case.run(**settings, save_lora_name="first")
    card.forget()
    case.run(**settings, save_lora_name="second")
    assert card.seen == [("predict", ("unet",))]


def test_modes_that_solve_or_draw_first_have_their_phases_too(case, tmp_path, card) -> None:
    made = pair_case.make(tmp_path)
    pairs = {"train_iterations": 1, "data_cache": "memory", "network_targets": "unet"}
    made.run(mode="Difference", save_lora_name="two", **pairs)
    assert {use: there for use, there in card.seen} == dict(PICTURES)
    card.forget()
    words = {"original prompt": "a red circle", "target prompt": "a blue circle"}
    case.run(mode="iLECO", save_lora_name="bank", ileco_bank=4, network_init="instant", **pairs, **words)
    assert card.seen == PICTURES[1:]


def test_pictures_are_the_same_with_every_part_elsewhere(case, card) -> None:
    model = load_model(case.model)
    settings = SampleSettings((64, 64), steps=2, batch_size=2)
    first = sample(model, ["a red circle", "a blue box", ""], settings)
    assert card.seen == [("encode_prompts", ("te1",)), ("predict", ("unet",)), ("decode", ("vae",))]
    settle(model, *model.parts)
    assert torch.equal(first, sample(model, ["a red circle", "a blue box", ""], settings))


def test_what_was_there_comes_back_however_a_phase_ends(case, card) -> None:
    model = load_model(case.model)
    settle(model, model.unet)
    with pytest.raises(ZeroDivisionError), using(model, model.vae):
        assert [card.names[part] for part in card.there] == ["vae"]
        raise ZeroDivisionError
    assert [card.names[part] for part in card.there] == ["unet"]
    with pytest.raises(RuntimeError, match="no room"), pytest.MonkeyPatch.context() as patch:
        own = Model.bring

        def bring(model: Model, part: object) -> None:
            if part is model.vae:
                raise RuntimeError("no room")
            own(model, part)

        patch.setattr(Model, "bring", bring)
        with using(model, model.vae):
            raise AssertionError("the block must not run")
    assert [card.names[part] for part in card.there] == ["unet"]


def test_a_visit_moves_at_its_first_call_and_once(case, card, monkeypatch) -> None:
    model, moves = load_model(case.model), []
    bring = Model.bring
    monkeypatch.setattr(Model, "bring", lambda model, part: (moves.append(part), bring(model, part)))
    settle(model, model.unet)
    moves.clear()
    visit = Visit(model, [model.vae], lambda number: number + 1)
    with visit:
        assert not moves
        assert [visit(n) for n in range(3)] == [1, 2, 3] and moves == [model.vae]
    assert moves == [model.vae, model.unet] and visit(4) == 5 and moves == [model.vae, model.unet] * 2


def test_weights_go_home_to_the_storage_they_came_from(case) -> None:
    model = load_model(case.model)
    weight = model.vae.decoder.conv_in.weight
    home = weight.data
    model.set_home([model.vae], {home.untyped_storage().data_ptr()})
    weight.data = home.clone()
    model.go_home(model.vae)
    assert weight.data_ptr() == home.data_ptr()


def test_pictures_that_do_not_fit_are_encoded_and_decoded_in_tiles(case, monkeypatch) -> None:
    model, notes = load_model(case.model), []
    pixels = torch.rand(1, 3, 96, 64) * 2 - 1
    whole = model.encode_images(pixels)
    assert torch.equal(model.encode_images(pixels, TILE)[0], whole[0])  # one tile holds it
    tiled = model.encode_images(pixels, 32)
    assert tiled[0].shape == whole[0].shape and not torch.equal(tiled[0], whole[0])
    assert torch.equal(model.encode_images(pixels)[0], whole[0])  # the switch was put back
    picture = model.decode(whole[0])
    assert model.decode(whole[0], 32).shape == picture.shape

    asked = []

    def short(model: Model, x: torch.Tensor, tile: int = 0):
        asked.append(tile)
        if not tile:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x

    monkeypatch.setattr(model, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Model, "encode_images", short)
    monkeypatch.setattr(Model, "decode", short)
    monkeypatch.setattr(Model, "is_here", lambda model, part: True)
    encode = picture_encoder(model, EventLog(lambda event: notes.append(event) if isinstance(event, Note) else None))
    assert encode(pixels) is pixels and encode(pixels) is pixels and decode(model, pixels) is pixels
    assert asked == [0, TILE] * 3
    assert [note.level for note in notes] == ["warning"] and "64x96" in notes[0].text
    large = torch.empty(1, 4, 2048 // model.latent_factor, 1024 // model.latent_factor)
    asked.clear()
    assert decode(model, large) is large and asked == [TILE]
    monkeypatch.setattr(model, "device", torch.device("cpu"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode(pixels)


def test_a_model_for_another_device_rests_where_its_file_is_mapped(case, monkeypatch) -> None:
    """It is neither copied nor laid out anew, computes as that device does, and moves when it is asked to."""
    moved: list[torch.device] = []
    monkeypatch.setattr(base.nn.Module, "to", lambda part, device: moved.append(device))
    model = load_model(case.model, device="cuda:0")
    assert model.device == torch.device("cuda:0") and {p.device.type for p in model.unet.parameters()} == {"cpu"}
    assert moved == [torch.float32]  # the VAE's precision, and nothing's place
    settle(model, model.unet)
    assert moved[1:] == [model.device]
