"""One contract for every WebUI, over stand-ins made from what the real ones do (hosts_fakes)."""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import types
from pathlib import Path

import children
import pytest
import tiny
import torch
from hosts_case import Told, addresses, digest, job, parameters, starter, weights
from hosts_fakes import FAKES, checkpoint_file
from safetensors.torch import load_file

from trainer.errors import BusyError, JobError
from trainer.events import EventLog
from trainer.hosts.webui import WebUI
from trainer.maths.rng import generator
from trainer.models.base import Model
from trainer.models.load import load_model

CASES = [("a1111", "sd1"), ("a1111", "sd2"), ("a1111", "sdxl"), ("forge", "sd1"), ("forge", "sdxl")]
CASES += [("neo", "sd1"), ("neo", "sdxl"), ("reforge", "sd1"), ("reforge", "sdxl")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The models of the files, read by our own loader."""
    folder = tmp_path_factory.mktemp("files")
    place = [tiny.vocabulary(folder / "words")]
    return {family: load_model(checkpoint_file(family), vocabularies=place) for family in tiny.KINDS}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    return starter(tmp_path, monkeypatch)


# -------------------------------------------------------------------- adoption


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_the_loaded_model_is_lent_without_its_lora_and_without_a_copy(kind, family, make, originals) -> None:
    fake, host = make(kind, family)
    clean, flags = digest(fake.live()), {name: tensor.requires_grad for name, tensor in fake.live().items()}
    fake.draw_with_lora()
    assert digest(fake.live()) != clean, "the stand-in merges nothing"
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is not None, told.lines
        assert digest(fake.live()) == clean
        theirs = addresses(fake.live().values())
        assert addresses(parameters(model)) <= theirs
        mine, expected = weights(model), weights(originals[family])
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in mine)
        two_steps(model)
        assert addresses(parameters(model)) <= theirs == addresses(fake.live().values())
    assert digest(fake.live()) == clean
    assert flags == {name: tensor.requires_grad for name, tensor in fake.live().items()}
    assert "not read again" in told


def two_steps(model: Model) -> None:
    """Gradient steps on something beside the weights, through UNet and text encoders, as an adapter takes them."""
    extra = torch.zeros(1, 4, 8, 8, requires_grad=True)
    noise = torch.randn(1, 4, 8, 8, generator=generator("hosts", 1))
    sizes = model.time_ids((64, 64), (0, 0), (64, 64))
    for _ in range(2):
        cond = model.encode_prompts(["ab"])
        out = model.predict(noise + extra, torch.tensor([300]), cond, None if sizes is None else sizes[None])
        (gradient,) = torch.autograd.grad(out.square().mean(), extra)
        assert gradient.abs().sum() > 0
        extra = (extra - gradient).detach().requires_grad_()


@pytest.mark.parametrize("kind", ["a1111", "forge"])
def test_another_precision_is_a_copy_that_is_told_with_its_size(kind, make) -> None:
    fake, host = make(kind, dtype=torch.float16)
    clean, told = digest(fake.live()), Told()
    with host.borrow(host.resolve(job(train_model_precision="fp32", train_VAE_precision="fp32")), told.log) as model:
        assert model.storage == torch.float32
        assert not addresses(parameters(model)) & addresses(fake.live().values())
        size = sum(p.numel() * 4 for p in parameters(model)) / 2**20
        assert f"{size:.0f} MB of it were copied" in told
    assert digest(fake.live()) == clean


def test_a_chosen_vae_takes_the_place_of_the_loaded_one(make, tmp_path) -> None:
    fake, host = make("a1111")
    path = tiny.single_file("sd1", tmp_path / "models" / "VAE" / "fine.safetensors", seed=7)
    fake.modules["modules.sd_vae"].vae_dict["fine.safetensors"] = str(path)
    told = Told()
    with host.borrow(host.resolve(job(vae="fine.safetensors", train_VAE_precision="model")), told.log) as model:
        mine = {p.untyped_storage().data_ptr() for p in model.vae.parameters()}
        assert not mine & addresses(fake.live().values())
        expected = tiny.checkpoint("sd1", seed=7)["first_stage_model.decoder.conv_in.weight"]
        assert torch.equal(model.vae.decoder.conv_in.weight, expected)
    assert host.vaes() == ("fine.safetensors",)


def test_the_vae_in_use_is_not_compared_with_the_checkpoint(make, tmp_path) -> None:
    fake, host = make("a1111")
    path = tmp_path / "models" / "VAE" / "in use.safetensors"
    path.write_bytes(b"x")
    fake.modules["modules.sd_vae"].loaded_vae_file = str(path)
    with torch.no_grad():
        for p in fake.data.sd_model.first_stage_model.parameters():
            p.add_(1)
    wanted = host.resolve(job())
    assert wanted.to_dict()["vae"] == str(path)
    with host.borrow(wanted, EventLog()) as model:
        assert addresses(model.vae.parameters()) <= addresses(fake.live().values())


def test_a_fresh_process_grows_by_less_than_two_percent() -> None:
    script = children.TESTS / "support" / "adopted_memory.py"
    done = subprocess.run(
        [sys.executable, script], env=children.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model, grown = map(float, done.stdout.split())
    assert model > 200
    assert grown < 0.02 * model


# -------------------------------------------------------------------- the lock


@pytest.mark.parametrize("kind", list(FAKES))
def test_drawing_waits_and_goes_on_however_the_training_ends(kind, make) -> None:
    fake, host = make(kind)
    drawn = threading.Event()

    def draw() -> None:
        with fake.lock:
            drawn.set()

    with pytest.raises(ZeroDivisionError), host.borrow(host.resolve(job()), EventLog()):
        drawing = threading.Thread(target=draw)
        drawing.start()
        with pytest.raises(BusyError, match="is training"):
            host.txt2img("a", "", 1, (64, 64), 2, 1.0)
        assert not drawn.wait(0.05)
        raise ZeroDivisionError
    assert drawn.wait(5)
    drawing.join()
    assert host.txt2img("a", "", 1, (64, 128), 2, 1.5).asked["width"] == 128
    assert not fake.lock.held


def test_a_training_waits_for_the_picture_that_is_being_drawn(make) -> None:
    fake, host = make("a1111")
    told, lent = Told(), threading.Event()

    def train() -> None:
        with host.borrow(host.resolve(job()), told.log):
            lent.set()

    with fake.lock:
        training = threading.Thread(target=train)
        training.start()
        assert not lent.wait(0.05)
    training.join(20)
    assert lent.is_set() and "Waiting until" in told


def test_a_failed_return_still_lets_the_webui_draw(make, monkeypatch) -> None:
    fake, host = make("a1111")

    def broken(restore) -> None:
        restore.callback(lambda: 1 / 0)

    monkeypatch.setattr(host, "make_room", broken)
    with pytest.raises(ZeroDivisionError), host.borrow(host.resolve(job(model="other")), EventLog()):
        pass
    assert not fake.lock.held
    host.txt2img("a", "", 1, (64, 64), 2, 1.0)


# -------------------------------------------------------------------- names, folders, login


@pytest.mark.parametrize("kind", list(FAKES))
def test_names_stand_for_files(kind, make, tmp_path) -> None:
    fake, host = make(kind)
    assert host.checkpoints() == ("loaded.safetensors", "other.safetensors")
    assert host.loaded_model() == "loaded.safetensors"
    folder = tmp_path / "models" / "Stable-diffusion"
    for name in ("other.safetensors", "other", "other.safetensors [0123456789]", str(fake.other)):
        assert Path(host.resolve(job(model=name)).to_dict()["model"]) == folder / "other.safetensors"
    with pytest.raises(JobError) as caught:
        host.resolve(job(model="othr", vae="nothing"))
    assert [problem.field for problem in caught.value.problems] == ["model", "vae"]
    assert host.places().loras == tmp_path / "models" / "Lora"
    assert host.places().checkpoints == folder
    host.refresh()
    host.refresh_loras()
    assert any(call.startswith("list") for call in fake.calls) and fake.calls[-1] == "list loras"
    assert not host.listens_beyond_loopback
    fake.cmd_opts.server_name = "192.168.0.7"
    assert host.listens_beyond_loopback


def test_forge_tells_vaes_from_text_encoders(make, tmp_path) -> None:
    fake, host = make("forge")
    listed = fake.modules["modules_forge.main_entry"].module_list
    listed["fine.safetensors"] = str(tiny.single_file("sd1", tmp_path / "models" / "VAE" / "fine.safetensors"))
    listed["clip_l.safetensors"] = str(tmp_path / "models" / "text_encoder" / "clip_l.safetensors")
    assert host.vaes() == ("fine.safetensors",)
    assert host.text_encoders() == ("clip_l.safetensors",)


def test_forge_uses_its_text_encoders_and_those_of_the_job(make, tmp_path) -> None:
    fake, host = make("forge")
    folder, told = tmp_path / "models" / "text_encoder", Told()
    places = (_under(folder / f"{name}.safetensors") for name in ("mine", "theirs"))
    mine, theirs = (tiny.encoder_file(path, "sd1", 0, "hf") for path in places)
    listed = fake.modules["modules_forge.main_entry"].module_list
    listed.update({path.name: str(path) for path in (mine, theirs)})
    fake.data.forge_loading_parameters["additional_modules"] = [str(theirs)]
    fake.data.forge_hash = str(fake.data.forge_loading_parameters)
    assert host.resolve(job()).to_dict()["te"] == str(theirs)
    assert "te" not in host.resolve(job(model="other")).to_dict()
    with pytest.raises(JobError, match="te"):
        host.resolve(job(te="nothing.safetensors"))
    wanted = host.resolve(job(te="mine.safetensors"))
    assert wanted.to_dict()["te"] == str(mine)
    texts = {}
    for name, asked in (("mine", wanted), ("live", host.resolve(job()))):
        with host.borrow(asked, told.log) as model:
            assert model is not None, told.lines
            texts[name] = model.text_encoders[0].transformer.embeddings.token_embedding.weight.clone()
    assert not torch.equal(texts["mine"], texts["live"])
    assert torch.equal(texts["mine"], load_file(mine)["text_model.embeddings.token_embedding.weight"])


def _under(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Request:
    """A request to gradio's app."""

    def __init__(self, app: object, cookies: dict[str, str] | None = None, basic: str = "") -> None:
        self.app, self.cookies = app, cookies or {}
        coded = base64.b64encode(basic.encode()).decode()
        self.headers = {"authorization": f"Basic {coded}"} if basic else {}


@pytest.mark.parametrize("suffix", ["", "-x1"])
def test_the_login_of_the_webui_is_ours(suffix, make) -> None:
    fake, host = make("a1111")
    app = types.SimpleNamespace(auth={"me": "word"}, tokens={"t": "me"})
    if suffix:  # since gradio 4
        app.cookie_id, app.auth_dependency = "x1", None
    assert host.authorised(Request(app, {f"access-token{suffix}": "t"}))
    assert host.authorised(Request(app, {f"access-token-unsecure{suffix}": "t"}))
    assert host.authorised(Request(app, basic="me:word"))
    for cookies, basic in (({}, ""), ({f"access-token{suffix}": "u"}, ""), ({"other": "t"}, ""), ({}, "me:wrong")):
        assert not host.authorised(Request(app, cookies, basic))
    fake.cmd_opts.api_auth = "robot:r2, other:o"
    assert host.authorised(Request(app, basic="robot:r2"))
    assert not host.authorised(Request(app, basic="robot:"))
    assert host.authorised(Request(types.SimpleNamespace(auth=None, tokens={})))


def test_a_webui_that_leaves_something_open_is_refused_with_its_names() -> None:
    class Half(WebUI):
        def loaded_path(self) -> Path | None:
            return None

    with pytest.raises(TypeError, match="lay_bare.*loaded_vae.*make_room"):
        Half()  # type: ignore[abstract]
