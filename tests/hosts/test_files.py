"""The files WebUIs run themselves: install.py, preload.py and scripts/atelier.py; and the host without a WebUI."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from trainer.engine.catalogue import catalogue
from trainer.errors import JobError
from trainer.events import EventLog
from trainer.hosts.standalone import Standalone
from trainer.params.codec import load
from trainer.params.job import Job
from trainer.places import BASE_MODEL, ROOT, Places


def file(name: str) -> types.ModuleType:
    """A file of the extension, loaded as WebUIs do it: under a name nobody can import."""
    spec = importlib.util.spec_from_file_location(f"webui.{name}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------- install.py

A1111 = {"torch": "2.1.2+cu121", "transformers": "4.30.2", "numpy": "1.26.2"}
FORGE = {"torch": "2.3.1", "transformers": "4.46.1", "diffusers": "0.31.0"}


def test_only_what_is_missing_is_asked_for() -> None:
    install = file("install.py")
    others = ["lycoris-lora>=4.1,<4.2", "pytorch-optimizer>=4.1,<5"]
    assert install.missing(FORGE) == others
    assert install.missing(A1111) == ["diffusers==0.31.0", *others]  # newer ones import what its transformers lacks
    assert install.missing({"transformers": "4.57.6"}) == ["diffusers>=0.31,<0.38", *others]
    whole = {**FORGE, "lycoris-lora": "4.1.3", "pytorch-optimizer": "4.1.0"}
    assert install.missing(whole) == [] == install.outdated(whole)
    assert "0.25.1 is installed and was left" in install.outdated({**whole, "diffusers": "0.25.1"})[0]


class Pip:
    """Stands in for pip: keeps what it was asked, and what it would have installed counts as installed.

    `fails`: the options with which it cannot find a way.
    """

    def __init__(self, install: types.ModuleType, there: dict[str, str], *fails: str) -> None:
        self.install, self.there, self.fails = install, dict(there), fails
        self.commands: list[list[str]] = []
        self.held: list[str] = []
        self.needs: dict[str, list[str]] = {}

    def put(self, monkeypatch: pytest.MonkeyPatch) -> Pip:
        monkeypatch.setattr(self.install.subprocess, "run", self.run)
        monkeypatch.setattr(self.install, "installed", lambda: dict(self.there))
        monkeypatch.setattr(self.install.importlib.metadata, "requires", lambda name: self.needs.get(name))
        return self

    def run(self, command: list[str], **_: object) -> types.SimpleNamespace:
        self.commands.append(command)
        if "--constraint" in command:
            self.held = Path(command[command.index("--constraint") + 1]).read_text().splitlines()
        if any(option in command for option in self.fails):
            return types.SimpleNamespace(returncode=1, stdout="no network here")
        for ask in command:
            found = self.install.requirement(ask) if ask[0].isalpha() and command.index(ask) > 3 else None
            if found is not None:
                self.there[self.install.plain(found.name)] = "4.1.9"
        return types.SimpleNamespace(returncode=0, stdout="done")


def test_pip_is_held_to_every_installed_version(monkeypatch, capsys) -> None:
    install = file("install.py")
    pip = Pip(install, FORGE, "--constraint", "--no-deps").put(monkeypatch)
    monkeypatch.setenv("INDEX_URL", "https://example.org")
    monkeypatch.setattr(install.sys, "executable", "/my venv/python")
    install.main()
    assert pip.held == ["diffusers==0.31.0", "torch==2.3.1", "transformers==4.46.1"]
    first = pip.commands[0]
    assert first[:4] == ["/my venv/python", "-m", "pip", "install"] and "--upgrade" not in first
    assert first[first.index("--index-url") + 1] == "https://example.org"
    said = capsys.readouterr().out
    assert "no network here" in said
    asked = '"lycoris-lora>=4.1,<4.2" "pytorch-optimizer>=4.1,<5"'
    assert f'run: "/my venv/python" -m pip install --no-deps {asked}' in said
    assert "its optimizers (Prodigy" in said and "diffusers Atelier" not in said


def test_packages_that_contradict_each_other_are_left_alone(monkeypatch, capsys) -> None:
    """As reForge: its launcher holds setuptools at 69.5.1, and a newer torch requires more."""
    install = file("install.py")
    pip = Pip(install, {**FORGE, "setuptools": "69.5.1"}).put(monkeypatch)
    pip.needs = {
        "torch": ["setuptools>=77.0.3", "numpy; extra == 'x'", "nonsense of (old) packages"],
        "lycoris-lora": ["toml", "torch>=2", "einops>=0.4; python_version > '3'", "more; python_version < '3'"],
        "toml": ["deeper>1"],
    }
    install.main()
    assert all("--constraint" not in command and "--no-deps" in command for command in pip.commands)
    assert [command[command.index("--no-deps") + 1 :] for command in pip.commands] == [
        ["lycoris-lora>=4.1,<4.2", "pytorch-optimizer>=4.1,<5"], ["einops>=0.4", "toml"], ["deeper>1"],
    ]  # fmt: skip
    assert pip.there["setuptools"] == "69.5.1" and pip.there["torch"] == "2.3.1"
    said = capsys.readouterr().out
    assert "torch 2.3.1 requires setuptools>=77.0.3, and 69.5.1 is installed" in said and "could not" not in said


def test_what_pip_cannot_resolve_is_installed_without_its_resolver(monkeypatch, capsys) -> None:
    install = file("install.py")
    pip = Pip(install, FORGE, "--constraint").put(monkeypatch)
    install.main()
    assert [("--constraint" in command, "--no-deps" in command) for command in pip.commands] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert "could not" not in capsys.readouterr().out


def test_a_start_with_everything_in_place_is_quick_and_says_nothing() -> None:
    before = os.times()
    done = subprocess.run([sys.executable, ROOT / "install.py"], capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stdout == done.stderr == ""
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1, "seconds of computing at every start of the WebUI"


def test_the_webui_gets_our_option() -> None:
    parser = argparse.ArgumentParser()
    file("preload.py").preload(parser)
    assert parser.parse_args(["--atelier-data-root", "x"]).atelier_data_root == "x"


# -------------------------------------------------------------------- scripts/atelier.py


class Callbacks:
    """`modules.script_callbacks`: forgets everything at Reload UI."""

    def __init__(self, monkeypatch) -> None:
        self.tabs, self.apps = [], []
        modules, own = types.ModuleType("modules"), types.ModuleType("modules.script_callbacks")
        own.on_ui_tabs, own.on_app_started = self.tabs.append, self.apps.append
        modules.script_callbacks = own
        monkeypatch.setitem(sys.modules, "modules", modules)
        monkeypatch.setitem(sys.modules, "modules.script_callbacks", own)

    def reload(self) -> None:
        self.tabs.clear()
        self.apps.clear()
        file("scripts/atelier.py")


@pytest.fixture
def callbacks(monkeypatch) -> Callbacks:
    for name in [name for name in sys.modules if name.partition(".")[0] == "atelier_trainer"]:
        monkeypatch.delitem(sys.modules, name)
    return Callbacks(monkeypatch)


def extension(**members: object) -> types.ModuleType:
    module = types.ModuleType("atelier_trainer.cli.extension")
    module.__dict__.update(members)
    return module


def test_the_trainer_gets_a_name_that_no_other_extension_has(callbacks, monkeypatch) -> None:
    stranger = types.ModuleType("trainer")
    monkeypatch.setitem(sys.modules, "trainer", stranger)
    monkeypatch.setitem(
        sys.modules, "atelier_trainer.cli.extension", extension(tab=lambda: "blocks", add_routes=lambda app: app)
    )
    callbacks.reload()
    package = sys.modules["atelier_trainer"]
    assert Path(package.__path__[0]) == ROOT / "trainer"
    assert sys.modules["trainer"] is stranger
    assert callbacks.tabs[0]() == [("blocks", "Atelier", "atelier")]
    assert callbacks.apps[0](None, "app") == "app"
    callbacks.reload()
    assert len(callbacks.tabs) == len(callbacks.apps) == 1
    assert sys.modules["atelier_trainer"] is package


def test_a_second_copy_of_the_extension_says_so(callbacks, monkeypatch, capsys) -> None:
    other = types.ModuleType("atelier_trainer")
    other.__path__ = [str(ROOT / "elsewhere")]
    monkeypatch.setitem(sys.modules, "atelier_trainer", other)
    texts = []
    gradio = types.ModuleType("gradio")
    gradio.Markdown = texts.append

    class Blocks:
        def __init__(self, **_) -> None: ...
        def __enter__(self) -> Blocks:
            return self

        def __exit__(self, *_) -> None: ...

    gradio.Blocks = Blocks
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    callbacks.reload()
    assert not callbacks.apps
    ((_, title, element),) = callbacks.tabs[0]()
    assert (title, element) == ("Atelier", "atelier")
    assert "installed twice" in texts[0] and "install.py" in texts[0]
    assert "installed twice" in capsys.readouterr().err


# -------------------------------------------------------------------- without a WebUI


def job(**settings: object) -> Job:
    return load({"format": 1, "mode": "LoRA", **settings}, catalogue(), complete=False).job


def test_alone_the_demo_model_is_chosen_and_folders_are_listed(tmp_path) -> None:
    places = Places.standalone(tmp_path)
    for name in ("Stable-diffusion/a.safetensors", "Stable-diffusion/sub/b.ckpt", "VAE/v.safetensors", "VAE/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for part in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        path = tmp_path / "Stable-diffusion" / "whole" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    host = Standalone(places)
    assert host.checkpoints() == ("demo", "a.safetensors", "sub/b.ckpt", "whole")
    assert host.vaes() == ("v.safetensors",)
    assert host.resolve(job()).to_dict()["model"] == str(BASE_MODEL)
    resolved = host.resolve(job(model="sub/b.ckpt", vae="v")).to_dict()
    assert Path(resolved["model"]) == places.checkpoints / "sub" / "b.ckpt"
    assert Path(resolved["vae"]) == places.vaes / "v.safetensors"
    with pytest.raises(JobError) as caught:
        host.resolve(job(model="c", vae="w"))
    assert [problem.field for problem in caught.value.problems] == ["model", "vae"]
    with host.borrow(job(), EventLog()) as model:
        assert model is None


def test_alone_it_knows_whether_others_can_reach_it(tmp_path) -> None:
    places = Places.standalone(tmp_path)
    for address in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert not Standalone(places, address=address).listens_beyond_loopback
    for address in ("0.0.0.0", "192.168.1.2", "::", "my-machine"):
        assert Standalone(places, address=address).listens_beyond_loopback
    assert Standalone(places).txt2img("a", "", 1, (64, 64), 4, 2.0) is None
