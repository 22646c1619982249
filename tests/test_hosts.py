"""One contract for every WebUI, over stand-ins made from what the real ones do (hosts_fakes)."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from children import environment
from hosts_fakes import FAKES, LORA, Fake, checkpoint_file
from safetensors.torch import load_file
from test_models_texts import encoder_file
from torch import Tensor

from trainer.engine.catalogue import catalogue
from trainer.errors import JobError
from trainer.events import EventLog, Note
from trainer.hosts import detect
from trainer.hosts.base import BusyError
from trainer.hosts.webui import WebUI
from trainer.maths.rng import generator
from trainer.models.base import Model
from trainer.models.live import NotAdoptable, adopt
from trainer.models.load import load_model
from trainer.params.codec import load
from trainer.params.job import Job

CASES = [("a1111", "sd1"), ("a1111", "sd2"), ("a1111", "sdxl"), ("forge", "sd1"), ("forge", "sdxl")]
CASES += [("neo", "sd1"), ("reforge", "sd1")]
CLASSES = {"a1111": "A1111", "forge": "Forge", "neo": "Neo", "reforge": "ReForge"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The models of the files, read by our own loader."""
    folder = tmp_path_factory.mktemp("files")
    place = [tiny.vocabulary(folder / "words")]
    return {family: load_model(checkpoint_file(family), vocabularies=place) for family in tiny.KINDS}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Starts a WebUI with a loaded model and gives it with our host in it."""
    for name in ("modules", "modules_forge", "backend", "ldm_patched", "networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def start(kind: str, family: str = "sd1", dtype: torch.dtype = torch.float32) -> tuple[Fake, WebUI]:
        fake = FAKES[kind](kind, family, tmp_path, monkeypatch, dtype)
        fake.load()
        host = detect.webui()
        assert type(host).__name__ == CLASSES[kind]
        monkeypatch.setattr(type(host), "vocabularies", lambda self: (tiny.vocabulary(tmp_path / "words"),))
        return fake, host

    yield start


class Told:
    """A log whose lines can be read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.log = EventLog(lambda event: self.lines.append(event.text) if isinstance(event, Note) else None)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def job(**settings: object) -> Job:
    settings = {"format": 1, "mode": "LoRA", "train_model_precision": "model", **settings}
    return load(settings, catalogue(), complete=False).job


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def addresses(tensors: object) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def parameters(model: Model) -> list[Tensor]:
    return list(weights(model).values())


def weights(model: Model) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, **{text.row.part: text for text in model.text_encoders}}
    return {f"{part}.{name}": tensor for part, tree in parts.items() for name, tensor in tree.named_parameters()}


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
    script = Path(__file__).with_name("adopted_memory.py")
    done = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, grown = map(float, done.stdout.split())
    assert model > 200
    assert grown < 0.02 * model


# -------------------------------------------------------------------- what cannot be adopted


def touch(tensor: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.add_(LORA)


def in_eight_bits(fake: Fake) -> None:
    layer = next(m for m in unet_of(fake).modules() if "weight" in m._parameters)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def half_elsewhere(fake: Fake) -> None:
    layer = next(m for m in unet_of(fake).modules() if "weight" in m._parameters)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)


def patched(fake: Fake) -> None:
    touch(next(m for m in unet_of(fake).modules() if "weight" in m._parameters).weight)


def file_gone(fake: Fake) -> None:
    fake.checkpoint.write_bytes(b"not a model")


def unet_of(fake: Fake) -> torch.nn.Module:
    return fake.data.sd_model.model.diffusion_model if fake.kind == "a1111" else fake.objects.unet.model


@pytest.mark.parametrize("kind", list(FAKES))
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (in_eight_bits, "quantised"),
        (half_elsewhere, "not in memory"),
        (patched, "changed its weights"),
        (file_gone, "cannot be read to compare"),
    ],
)
def test_what_cannot_be_adopted_is_read_from_its_file_and_said(kind, harm, said, make) -> None:
    fake, host = make(kind)
    harm(fake)
    before, told = digest({n: t for n, t in fake.live().items() if not t.is_meta}), Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None
        assert said in told and "read from its file" in told
        assert kind == "a1111" or "to memory" in fake.calls
    assert digest({n: t for n, t in fake.live().items() if not t.is_meta}) == before
    assert not fake.lock.held


def test_forges_own_reasons_to_read_the_file(make) -> None:
    fake, host = make("forge")
    load_gpu = fake.modules["backend.memory_management"].load_models_gpu

    def in_part(patchers: list[object]) -> None:
        load_gpu(patchers)
        fake.loaded[0].model_accelerated = True

    fake.modules["backend.memory_management"].load_models_gpu = in_part
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "does not fit" in told
    fake.modules["backend.memory_management"].load_models_gpu = load_gpu
    fake.objects.unet.object_patches["diffusion_model.out"] = object()
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "replaced parts" in told


def test_a1111s_own_reasons_to_read_the_file(make) -> None:
    fake, host = make("a1111")
    fake.data.sd_model.lowvram = True
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "medvram" in told
        assert fake.calls == ["to memory"]
    assert fake.calls == ["to memory", "to device"]
    fake.data.sd_model.lowvram = False
    fake.modules["modules.sd_unet"].current_unet = object()
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "TensorRT" in told


@pytest.mark.parametrize("kind", list(FAKES))
def test_a_webui_that_is_not_as_we_know_it_still_trains_from_the_file(kind, make, monkeypatch) -> None:
    _, host = make(kind)
    monkeypatch.setattr(type(host), "lay_bare", lambda self, restore: restore.no_such_thing())
    told = Told()
    with host.borrow(host.resolve(job()), told.log) as model:
        assert model is None and "AttributeError" in told


@pytest.mark.parametrize("kind", list(FAKES))
def test_another_model_is_read_from_its_file_with_the_loaded_one_out_of_the_way(kind, make) -> None:
    fake, host = make(kind)
    told = Told()
    with host.borrow(host.resolve(job(model="other.safetensors")), told.log) as model:
        assert model is None and "other.safetensors is not loaded" in told
        assert kind == "a1111" or fake.calls == ["to memory"]


def test_models_kept_beside_the_loaded_one_leave_the_device_meanwhile(make) -> None:
    fake, host = make("a1111")
    kept = types.SimpleNamespace(lowvram=False, parameters=lambda: iter([torch.empty(0, device="meta")]))
    fake.data.loaded_sd_models.append(kept)
    with pytest.raises(ZeroDivisionError), host.borrow(host.resolve(job()), EventLog()) as model:
        assert model is not None and fake.calls == ["to memory"]
        raise ZeroDivisionError
    assert fake.calls == ["to memory", "to device"]


def test_forge_adopts_only_what_the_next_picture_would_be_drawn_with(make) -> None:
    fake, host = make("forge")
    fake.data.forge_loading_parameters["checkpoint_info"] = fake.infos[1]  # selected since, not loaded yet
    assert host.loaded_model() == "other.safetensors"
    assert Path(host.resolve(job()).to_dict()["model"]) == fake.other
    fake.data.sd_model = types.SimpleNamespace()  # the stand-in before the first picture
    told = Told()
    with host.borrow(host.resolve(job(model="loaded")), told.log) as model:
        assert model is None and "is not loaded in Forge" in told


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
    mine, theirs = (encoder_file(_under(folder / f"{name}.safetensors"), "sd1", 0, "hf") for name in ("mine", "theirs"))
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


def test_tensors_that_are_packed_are_refused(tmp_path) -> None:
    class Packed(Tensor):
        pass

    from trainer.models.live import Live

    packed = torch.zeros(2).as_subclass(Packed)
    with pytest.raises(NotAdoptable, match="packed"):
        adopt(Live(tmp_path / "x.safetensors", {"model.diffusion_model.a.weight": packed}))


def test_a_webui_that_leaves_something_open_is_refused_with_its_names() -> None:
    class Half(WebUI):
        def loaded_path(self) -> Path | None:
            return None

    with pytest.raises(TypeError, match="lay_bare.*loaded_vae.*make_room"):
        Half()  # type: ignore[abstract]
