"""Which files a request can name: ways up, links, absolute and network paths, on this machine and from others."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from service_case import Case, make, settings

from trainer.places import BASE_PICTURES, Places
from trainer.ui.fence import Fence, NotServedError, served


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    made = make(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture outside of everything, with copies of other kinds."""
    folder = tmp_path / "secret"
    folder.mkdir()
    for name in ("a.png", "a.csv", "a.json", "a.safetensors"):
        (folder / name).write_bytes(b"what nobody may read")
    return folder


def ways_to(secret: Path, below: Path) -> list[str]:
    """Names by which somebody would try to reach the secret files from a folder."""
    up = os.path.relpath(secret, below).replace(os.sep, "/")
    return [
        f"{up}/a",
        f"x/../{up}/a",
        f"./{up}/a",
        f"{up}/a".replace("/", "\\"),
        f"{secret}/a",
        f"/{secret}/a",
        f"//{secret}/a",
        "C:/Windows/a",
        "C:a",
        "C:\\Windows\\a",
        "\\\\server\\share\\a",
        "//server/share/a",
        "\\\\?\\C:\\a",
        "%2e%2e/a",
        "..%2fa",
        "link/a",
        "x//a",
        "",
        ".",
        "..",
        "a\x00",
        "a:stream",
        "~/a",
    ]


@pytest.mark.parametrize(
    ("route", "where", "suffix", "good"),
    [
        ("files/", "logs", ".png", "2026-11-21/run/samples/000100_0.png"),
        ("logs/", "logs", ".csv", "2026-11-21/run/x.csv"),
        ("settings/", "json", ".json", "2026-11-21/x.json"),
    ],
)
def test_served_files_stay_in_their_folder(
    case: Case, secret: Path, route: str, where: str, suffix: str, good: str
) -> None:
    folder: Path = getattr(case.host.places(), where)
    target = folder / good
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(settings()))
    (folder / "link").symlink_to(secret, target_is_directory=True)
    (folder / f"direct{suffix}").symlink_to(secret / f"a{suffix}")
    for name in [*(f"{way}{suffix}" for way in ways_to(secret, folder)), f"direct{suffix}", *ways_to(secret, folder)]:
        answer = case.get(route + name)
        assert answer.status == (200 if not name and route == "logs/" else 404), name
        assert b"nobody" not in answer.content, name
    assert case.get(route + good).status == 200
    for other in ("job.json", "state.safetensors", "x.txt", "x"):
        path = target.parent / other
        path.write_text("x")
        if path.suffix != suffix:
            assert case.get(f"{route}{target.parent.relative_to(folder).as_posix()}/{other}").status == 404


def test_lists_name_only_what_can_be_had(case: Case, secret: Path) -> None:
    logs = case.host.places().logs
    (logs / "2026-11-21").mkdir()
    (logs / "2026-11-21" / "x.csv").touch()
    (logs / "direct.csv").symlink_to(secret / "a.csv")
    (logs / "gone.csv").symlink_to(secret / "no such file.csv")
    (logs / "cache").mkdir()
    (logs / "cache" / "y.csv").touch()
    assert case.get("logs").json == {"logs": ["2026-11-21/x.csv"]}


def test_a_link_that_stays_inside_is_followed(case: Case) -> None:
    logs = case.host.places().logs
    (logs / "run").mkdir()
    (logs / "run" / "a.png").write_bytes(b"picture")
    (logs / "latest").symlink_to(logs / "run", target_is_directory=True)
    answer = case.get("files/latest/a.png")
    assert answer.content == b"picture" and answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_is_not_there_and_what_is_not_served_look_alike(case: Case, secret: Path) -> None:
    there, not_there = f"{secret}/a.png", f"{secret}/b.png"
    answers = [case.get(f"files/{name}").json["error"].replace(name, "NAME") for name in (there, not_there)]
    assert answers[0] == answers[1]
    with pytest.raises(NotServedError):
        served(secret, "../secret/a.png", frozenset({".png"}))


@pytest.mark.parametrize("name", ["../a", "a/b", "a\\b", "/etc/a", "C:\\a", "\\\\server\\a", "..", "con", "a\x00", ""])
def test_presets_are_named_not_addressed(case: Case, name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for path, body in (
        ("presets/save", {"name": name, "settings": settings()}),
        ("presets/delete", {"name": name}),
    ):
        assert case.post(path, body).status == 422
    assert case.get(f"presets/{name}").status in (404, 422) or not name
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "C:\\x", "\\\\server\\share\\x", "a/../../x"])
def test_a_lora_is_written_nowhere_else(case: Case, name: str) -> None:
    answer = case.post("start", {"settings": settings(name)})
    assert answer.status == 422 and [problem["field"] for problem in answer.json["problems"]] == ["save_lora_name"]


# ------------------------------------------------------------------------------------------- what a job may read


def data(folder: str) -> dict[str, object]:
    return {"mode": "LoRA", "lora_data_directory": folder, "save_lora_name": "x"}


def folder_problems(case: Case, folder: str) -> list[str]:
    found = case.post("validate", {"settings": data(folder)}).json["problems"]
    assert {problem["field"] for problem in found} <= {"lora_data_directory"}
    return [problem["message"] for problem in found]


def test_on_this_machine_pictures_may_lie_anywhere(case: Case, secret: Path) -> None:
    assert folder_problems(case, str(secret)) == []
    assert case.post("folder", {"settings": data(str(secret))}).status == 200


@pytest.fixture
def wide(case: Case) -> Case:
    """The case, reachable from other machines, with a data root."""
    root = case.root / "data root"
    (root / "cats" / "grey").mkdir(parents=True)
    case.host.listens_beyond_loopback, case.host.data_root = True, root
    return case


def test_from_elsewhere_pictures_lie_below_the_data_root(wide: Case, secret: Path) -> None:
    root = wide.host.data_root
    assert root is not None
    (root / "out").symlink_to(secret, target_is_directory=True)
    (root / "in").symlink_to(root / "cats", target_is_directory=True)
    for right in (root, root / "cats", root / "cats" / "grey", root / "in", root / "not yet there", BASE_PICTURES):
        assert folder_problems(wide, str(right)) == [], right
        assert folder_problems(wide, f'"{right}"') == [], "quotes of a pasted path"
    sibling = root.with_name("data root2")
    sibling.mkdir()
    for wrong in (
        str(secret),
        f"{root}/../../secret",
        f"{root}/cats/../../..",
        str(root / "out"),
        str(root.parent),
        str(sibling),
        "/",
        ".",
        "cats",
        "~",
        "~root",
        "\\\\server\\share",
        "//server/share",
        f"/{root}",
        '"\\\\server\\share"',
        "\\\\?\\C:\\x",
        "C:\\pictures",
        "C:pictures",
        "x" * 5000,
    ):
        assert [message for message in folder_problems(wide, wrong) if "--data-root" in message], wrong
        answer = wide.post("folder", {"settings": data(wrong)})
        assert answer.status == 422 and "--data-root" in answer.json["error"]
    assert wide.backend.looked == [], "nothing outside was touched"
    for path in ("start", "queue"):
        assert wide.post(path, {"settings": data(str(secret))}).status == 422
    assert wide.queue.waiting() == () and wide.queue.running() is None


def test_without_a_data_root_only_what_is_shipped(wide: Case, secret: Path) -> None:
    wide.host.data_root = None
    assert "Start it with --data-root FOLDER" in folder_problems(wide, str(secret))[0]
    assert folder_problems(wide, str(BASE_PICTURES)) == []


def test_what_is_outside_is_not_told_apart_from_what_is_not_there(wide: Case, secret: Path) -> None:
    assert folder_problems(wide, str(secret)) == folder_problems(wide, str(secret / "nothing"))


@pytest.mark.parametrize(
    ("field", "mode"),
    [
        ("model", "iLECO"),
        ("vae", "iLECO"),
        ("te", "iLECO"),
        ("network_resume", "LoRA"),
        ("diff_load_1st_pass", "LoRA"),
        ("original image", "LoRA"),
        ("original_image", "LoRA"),
    ],
)
def test_every_other_file_a_job_names_is_fenced_too(wide: Case, secret: Path, field: str, mode: str) -> None:
    places = wide.host.places()
    own = {"model": places.checkpoints, "vae": places.vaes, "te": None}.get(field, places.loras)
    if "image" in field:
        own = wide.host.data_root

    def told(value: str) -> list[str]:
        given = {**settings(), "mode": mode, "lora_data_directory": str(BASE_PICTURES), field: value}
        found = wide.post("validate", {"settings": given}).json["problems"]
        return [problem["field"] for problem in found]

    for wrong in (str(secret / "a.safetensors"), "../../secret/a.safetensors", "\\\\server\\share\\a.safetensors",
                  "//server/share/a", "C:\\a.safetensors"):  # fmt: skip
        assert told(wrong) == [field.replace("original_image", "original image")], wrong
    if own is not None:
        (own / "x.safetensors").touch()
        (own / "leads out.safetensors").symlink_to(secret / "a.safetensors")
        assert told(str(own / "x.safetensors")) == []
        assert told(str(own / "leads out.safetensors")) != []


def test_names_the_host_lists_may_be_chosen(wide: Case) -> None:
    for value in ("demo", "base.safetensors", "", "None", "sub/other.safetensors"):
        answer = wide.post("validate", {"settings": {**settings(), "model": value}})
        assert answer.json["ok"], (value, answer.json)


def test_the_second_pass_is_fenced_too(wide: Case, secret: Path) -> None:
    catalogue = wide.service.catalogue
    fence = Fence(wide.host.places(), None, False, lambda kind: ())
    raw = {"model": "demo", "2nd pass": {"network_resume": str(secret / "a.safetensors"), "model": "demo"}}
    assert [problem.field for problem in fence.problems(raw, catalogue)] == ["2nd pass.network_resume"]
    assert list(Fence(wide.host.places(), None, True, lambda kind: ()).problems(raw, catalogue)) == []


def test_a_name_in_the_working_folder_does_not_shadow_the_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes the file in the working folder first, so the fence has to judge that one."""
    places = Places.standalone(tmp_path / "models")
    places.checkpoints.mkdir(parents=True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    fence = Fence(places, None, False, lambda kind: ())
    (places.checkpoints / "a.safetensors").touch()
    assert fence.allows("a.safetensors", "model") and fence.allows("a", "model")
    (tmp_path / "cwd" / "a.safetensors").touch()
    assert not fence.allows("a.safetensors", "model") and fence.allows("a", "model")


def test_folders_open_only_where_nobody_else_can_ask(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Path] = []
    monkeypatch.setattr("trainer.ui.shelf._show", shown.append)
    for name in ("loras", "logs", "json", "presets"):
        assert case.post("open", {"folder": name}).status == 200
    assert shown[0] == case.host.places().loras and len(shown) == 4
    for name in ("run", "..", "/etc", ""):
        assert case.post("open", {"folder": name}).status == 422
    case.host.listens_beyond_loopback = True
    assert case.post("open", {"folder": "loras"}).status == 422 and len(shown) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for the opener of Linux desktops")
@pytest.mark.parametrize("opener", ["", "exit 3", 'echo "$1" > "$0.told"'], ids=["none", "without a screen", "right"])
def test_where_no_file_manager_opens_the_folder_is_told(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: str
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "xdg-open"
    if opener:
        program.write_text(f"#!/bin/sh\n{opener}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    answer, folder = case.post("open", {"folder": "loras"}), case.host.places().loras.resolve()
    if opener.startswith("echo"):
        assert answer.status == 200 and (programs / "xdg-open.told").read_text().strip() == str(folder)
    else:
        assert answer.status == 422
        assert answer.json["error"] == f"No file manager opens on this machine. The folder is {folder}."
