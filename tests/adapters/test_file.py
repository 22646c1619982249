"""LoRA files: whole or not at all, the same bytes for the same job, kohya's hashes, and no folder of the machine."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer import writing
from trainer.adapters.file import legacy_hash, model_hash, read_lora, write_lora
from trainer.adapters.metadata import FileFacts, baked_strength, base_names, build_metadata
from trainer.errors import AdapterError

TENSORS = {"a.lora_up.weight": torch.arange(6.0).view(2, 3).half(), "a.alpha": torch.tensor(4.0)}
HOME = str(Path.home()) if str(Path.home()) != "/" else "/home/someone"
FACTS = FileFacts(
    name="cat",
    model_name=f"{HOME}/models/base.safetensors",
    model_hash="ab" * 32,
    network_args={"conv_dim": "4"},
    strength=2.0,
    started_at=1_700_000_000.0,
    finished_at=1_700_000_100.0,
    seed=7,
    resolution=(512, 768),
    pictures=3,
    bucket_counts={"512x768": 3},
    dataset_folders={f"{HOME}/pics/cat": (10, 3)},
    tag_frequency={f"{HOME}/pics/cat": {"a/b": 2}},
    clip_skip=2,
    trigger_word="sks",
    learning_rate=1e-4,
    optimizer="AdamW",
    batch_size=2,
    accumulation=2,
    vae_name="v.pt",
    job={
        "mode": "LoRA",
        "lora_data_directory": f"{HOME}/my pics/cat",
        "original prompt": "cat and/or dog",
        "network_rank": 16,
        "train_optimizer_settings": f"path={HOME}/x.bin;eps=1e-8",
        "2nd pass": {"model": "C:\\Users\\me\\sd.ckpt"},
        "places": [f"{HOME}/a", Path(HOME) / "b"],
    },
)


def test_round_trip_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "new" / "a.safetensors", TENSORS, build_metadata(FACTS))
    tensors, metadata = read_lora(path)
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], t) and t.dtype == tensors[name].dtype for name, t in TENSORS.items())
    assert metadata["ss_network_dim"] == "16" and metadata["ss_v2"] == "False"
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == metadata
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_the_same_job_gives_the_same_bytes_apart_from_dates(tmp_path: Path) -> None:
    later = dataclasses.replace(FACTS, started_at=1_800_000_000.0, finished_at=1_800_000_100.0)
    reversed_tensors = dict(reversed(TENSORS.items()))
    one, two, other = (
        write_lora(tmp_path / f"{n}.safetensors", tensors, build_metadata(facts))
        for n, (tensors, facts) in enumerate([(TENSORS, FACTS), (reversed_tensors, FACTS), (TENSORS, later)])
    )
    assert one.read_bytes() == two.read_bytes()
    first, second = read_lora(one)[1], read_lora(other)[1]
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def test_hashes_are_recomputed_from_the_bytes(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", TENSORS, build_metadata(FACTS))
    content, metadata = path.read_bytes(), read_lora(path)[1]
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest() == model_hash(path)
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert metadata["sshs_legacy_hash"] == "e3b0c442" == legacy_hash(path)


def test_the_legacy_hash_is_of_a_file_with_training_keys_only(tmp_path: Path) -> None:
    big = {"x": torch.arange(600_000, dtype=torch.float32)}
    metadata = build_metadata(FACTS)
    path = write_lora(tmp_path / "a.safetensors", big, metadata)
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(big, plain, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    assert read_lora(path)[1]["sshs_legacy_hash"] == legacy_hash(plain)


def test_the_model_hash_survives_other_metadata(tmp_path: Path) -> None:
    full, none = (
        write_lora(tmp_path / f"{level}.safetensors", TENSORS, build_metadata(FACTS, level))
        for level in ("full", "none")
    )
    assert model_hash(full) == model_hash(none)


def test_no_path_of_the_machine_is_in_the_file(tmp_path: Path) -> None:
    for level in ("full", "minimal", "none"):
        content = write_lora(tmp_path / "a.safetensors", TENSORS, build_metadata(FACTS, level)).read_bytes()
        assert HOME.encode() not in content and b"Users" not in content and str(tmp_path).encode() not in content
    job = json.loads(build_metadata(FACTS)["atelier_job"])
    assert job["lora_data_directory"] == "cat" and job["2nd pass"] == {"model": "sd.ckpt"}
    assert job["original prompt"] == "cat and/or dog" and job["places"] == ["a", "b"] and job["network_rank"] == 16
    assert job["train_optimizer_settings"] == "path=x.bin;eps=1e-8"


@pytest.mark.parametrize(
    ("given", "key", "wanted"),
    [
        ("/home/me/pics/cat.png", "", "cat.png"),
        ("C:\\Users\\Me Too\\pics\\", "", "pics"),
        ("D:/models/x y.safetensors", "", "x y.safetensors"),
        ("\\\\server\\share\\set", "", "set"),
        ("~/pics", "", "pics"),
        ("~me/pics", "original prompt", "pics"),
        ("../up/x", "", "x"),
        ("file:///home/me/x", "", "x"),
        ("see /home/me/c.png, or https://a.example/b/c", "sample_prompts", "see c.png, or https://a.example/b/c"),
        ("one\n/home/me/two\nthree", "", "one\ntwo\nthree"),
        ("my pics/cat set", "lora_data_directory", "cat set"),
        ("pics/cat", "anything", "cat"),
        ("cat and/or dog", "anything", "cat and/or dog"),
        ("and/or", "target prompt", "and/or"),
        ("name_\\(series\\), w/ hat", "lora_trigger_word", "name_\\(series\\), w/ hat"),
        ("name_\\(series\\)", "anything", "name_\\(series\\)"),
        ("512,512", "image_size(height, width)", "512,512"),
        ("", "", ""),
    ],
)
def test_what_looks_like_a_path_keeps_its_last_part(given: str, key: str, wanted: str) -> None:
    assert base_names({key: given}) == {key: wanted}


def test_base_names_leave_other_values_alone() -> None:
    given = {"a": 1, "b": [1.5, None, True, ("x", "/r/y")], "/home/me/k": {"c": "/d/e"}}
    assert base_names(given) == {"a": 1, "b": [1.5, None, True, ["x", "y"]], "k": {"c": "e"}}


def test_metadata_are_sorted_strings_with_the_keys_webuis_read() -> None:
    metadata = build_metadata(FACTS)
    assert list(metadata) == sorted(metadata)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    minimal = build_metadata(FACTS, "minimal")
    for key in (
        "ss_base_model_version",
        "ss_v2",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_output_name",
        "ss_training_started_at",
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_resolution",
        "ss_num_train_images",
        "ss_clip_skip",
        "ss_sd_model_name",
        "modelspec.architecture",
        "modelspec.sai_model_spec",
        "atelier_baked_strength",
    ):
        assert metadata[key] == minimal[key]
    assert "atelier_job" not in minimal and "ss_seed" not in minimal
    assert json.loads(metadata["ss_tag_frequency"]) == {"cat": {"a/b": 2}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"cat": {"n_repeats": 10, "img_count": 3}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"] == {"resolution": [512, 768], "count": 3}
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4"}
    assert metadata["ss_sd_model_name"] == "base.safetensors" and metadata["ss_total_batch_size"] == "4"


@pytest.mark.parametrize(
    ("version", "prediction", "architecture", "v2", "kind"),
    [
        ("sd_v1", "epsilon", "stable-diffusion-v1/lora", "False", "epsilon"),
        ("sd_v2_v", "v_prediction", "stable-diffusion-v2-768-v/lora", "True", "v"),
        ("sdxl_base_v1-0", "epsilon", "stable-diffusion-xl-v1-base/lora", "False", "epsilon"),
    ],
)
def test_modelspec(version: str, prediction: str, architecture: str, v2: str, kind: str) -> None:
    metadata = build_metadata(dataclasses.replace(FACTS, base_version=version, prediction=prediction))
    assert metadata["modelspec.architecture"] == architecture and metadata["ss_v2"] == v2
    assert metadata["modelspec.prediction_type"] == kind and metadata["modelspec.resolution"] == "512x768"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", metadata["modelspec.date"])
    sdxl = version.startswith("sdxl")
    assert metadata["modelspec.implementation"].startswith("https://" if sdxl else "diffusers")
    assert metadata["modelspec.trigger_phrase"] == "sks" and metadata["modelspec.encoder_layer"] == "2"


def test_none_keeps_only_a_strength_that_matters() -> None:
    assert build_metadata(FACTS, "none") == {"atelier_baked_strength": "2.0"}
    assert build_metadata(dataclasses.replace(FACTS, strength=1.0), "none") == {}
    with pytest.raises(ValueError, match="full, minimal, none"):
        build_metadata(FACTS, "some")


def test_baked_strength_is_read_back() -> None:
    assert baked_strength(build_metadata(FACTS)) == 2.0 and baked_strength({}) == 1.0
    with pytest.raises(AdapterError, match="not a number"):
        baked_strength({"atelier_baked_strength": "much"})


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(AdapterError, match="the disk is full"):
        write_lora(path, TENSORS, {})
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_held_open_elsewhere_gets_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def held(source: Path, target: Path) -> None:
        if Path(target).name == "a.safetensors":
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", held)
    monkeypatch.setattr(writing, "_PAUSE", 0)
    (tmp_path / "a.safetensors").write_bytes(b"mapped by a WebUI")
    paths = [write_lora(tmp_path / "a.safetensors", TENSORS, {}, overwrite=True) for _ in range(2)]
    assert [path.name for path in paths] == ["a-1.safetensors", "a-2.safetensors"]
    assert torch.equal(read_lora(paths[0])[0]["a.alpha"], TENSORS["a.alpha"])


def test_a_file_that_reads_back_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(descriptor: int) -> None:
        os.lseek(descriptor, -1, os.SEEK_END)
        os.write(descriptor, b"\xff")

    monkeypatch.setattr(writing.os, "fsync", spoil)
    with pytest.raises(AdapterError, match="reads back differently"):
        write_lora(tmp_path / "a.safetensors", TENSORS, {})
    assert os.listdir(tmp_path) == []


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", TENSORS, {})
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-3])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, message in (
        ("cut.safetensors", "not a complete"),
        ("empty.safetensors", "not a complete"),
        ("b.safetensors", "no LoRA file"),
        ("c.pt", "not a .safetensors"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_lora(tmp_path / name)


def test_a_file_without_metadata_reads(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors")[1] == {}
