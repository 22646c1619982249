"""Presets: the shipped ones load, the user's own are written whole and kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from params_table import catalogue, traintrain_file

from trainer.errors import JobError
from trainer.params.codec import load
from trainer.params.core import Images, Network, Save, Task, Train
from trainer.params.files import write_json
from trainer.params.presets import Presets
from trainer.places import ROOT

TABLE = catalogue()
SHIPPED = Path(__file__).resolve().parents[2] / "presets"
GOOD = {"lora_data_directory": "pictures", "network_rank": 4}


def table():
    """The whole catalogue where it is there, else the tests' own."""
    try:
        from trainer.engine.catalogue import catalogue as whole
    except ImportError:
        return TABLE
    return whole()


@pytest.fixture
def presets(tmp_path):
    write_json(tmp_path / "Shipped.json", {"format": 1, "mode": "LoRA", "network_rank": 2})
    return Presets(tmp_path)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_shipped_presets_load(name):
    loaded = Presets(SHIPPED).load(name, table())
    assert loaded.warnings == ()
    raw = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    assert raw["format"] == 1 and loaded.job[Task].mode == raw["mode"]
    assert not any(str(value).startswith(("/", "C:")) for value in raw.values())
    if "folder" in table().modes[raw["mode"]].needs:  # the one thing such a preset cannot know
        with pytest.raises(JobError, match="lora_data_directory"):
            load(raw, table())
    elif "pictures" in table().modes[raw["mode"]].needs:
        with pytest.raises(JobError, match="original image"):
            load(raw, table())
        assert load({**raw, "original image": "a.png", "target image": "b.png"}, table()).warnings == ()
    elif "prompts" in table().modes[raw["mode"]].needs:
        with pytest.raises(JobError, match="original prompt"):
            load(raw, table())
    else:
        assert load(raw, table()).warnings == ()


def test_the_presets_there_are():
    names = Presets(SHIPPED).shipped()
    assert "LoRA" in names and "demo" in names


def test_demo_fits_the_painted_world():
    job = Presets(SHIPPED).load("demo", table()).job
    images = job[Images]
    assert (images.image_size, images.image_min_length, images.image_buckets_step) == ((64, 64), 64, 64)
    assert (job[Train].train_seed, job[Save].save_lora_name, job[Task].model) == (1, "demo", "")


def test_save_load_delete(presets):
    job = load(GOOD, TABLE).job
    path = presets.save("mine 猫", job)
    assert path.parent.name == "user"
    assert (
        presets.names() == ("Shipped", "mine 猫")
        and presets.own() == ("mine 猫",)
        and presets.shipped() == ("Shipped",)
    )
    assert presets.load("mine 猫", TABLE).job == job
    assert set(presets.read("mine 猫")) == {parameter.key for parameter in TABLE.parameters}
    presets.save("MINE 猫", job.replace(network_rank=8))
    assert presets.own() == ("mine 猫",) and presets.load("Mine 猫", TABLE).job[Network].network_rank == 8
    presets.delete("mine 猫")
    assert presets.names() == ("Shipped",)
    assert not list(path.parent.iterdir())


def test_a_preset_of_traintrain(presets, tmp_path):
    raw = traintrain_file() | {"lora_data_directory": ""}
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "old.json").write_text(json.dumps(raw), encoding="utf-8")
    job = presets.load("old", TABLE).job
    presets.save("old", job)
    assert presets.load("old", TABLE).job == job and job.traintrain


@pytest.mark.parametrize("name", ["Shipped", "shipped", "../x", "a/b", "", "nul", "a.", "/etc/passwd", "C:\\x"])
def test_names_that_cannot_be(presets, name):
    job = load(GOOD, TABLE).job
    for act in (lambda: presets.save(name, job), lambda: presets.delete(name)):
        with pytest.raises(JobError, match="preset"):
            act()
    assert presets.own() == ()


def test_absent_presets(presets):
    for act in (
        lambda: presets.load("absent", TABLE),
        lambda: presets.delete("absent"),
        lambda: presets.load("..", TABLE),
    ):
        with pytest.raises(JobError, match="is not there"):
            act()
    assert Presets(Path("/nowhere at all")).names() == ()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_json(path, {"a": 2})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and [found.name for found in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_cannot_be_written(presets, tmp_path):
    (tmp_path / "user").write_text("a file in the way")
    with pytest.raises(JobError, match="cannot be written"):
        presets.save("mine", load(GOOD, TABLE).job)


def test_each_mode_has_a_preset_of_its_own_values() -> None:
    shelf = Presets(ROOT / "presets")
    named = {mode: shelf.of_mode(mode) for mode in ("LoRA", "iLECO", "Difference", "Instant", "ADDifT", "Multi-ADDifT")}
    assert [named[mode] for mode in ("LoRA", "iLECO", "Difference", "Instant")] == list(named)[:4]
    assert named["ADDifT"].startswith("ADDifT_") and named["Multi-ADDifT"] == named["ADDifT"]
    assert shelf.of_mode("Nothing") == ""
