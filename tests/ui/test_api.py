"""The routes as pages and programs call them: who may, what comes back, what is refused and how."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from queue_case import names, step, until
from service_case import Case, make, settings

from trainer.errors import Problem
from trainer.events import Note, Sampled, Saved
from trainer.places import BASE_PICTURES
from trainer.ui.api import ENTRANCES, add_routes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    made = make(tmp_path)
    yield made
    made.close()


def test_start_runs_and_a_second_start_gets_its_place(case: Case) -> None:
    first = case.post("start", {"settings": settings("one")})
    second = case.post("start", {"settings": settings("two")})
    assert (first.status, first.json["position"]) == (200, 0) and first.json["message"] == "one starts."
    assert (second.status, second.json["position"]) == (200, 1)
    assert second.json["message"] == "two waits in the queue as number 1; one is running."
    until(lambda: case.gate.ran)
    status = case.get("status").json
    assert status["state"] == "running" and status["run"]["name"] == "one" and status["queue"]["waiting"] == 1
    listed = case.get("queue").json
    assert listed["running"]["id"] == first.json["id"] and [entry["name"] for entry in listed["waiting"]] == ["two"]
    case.gate.let_go("one")
    case.gate.let_go("two")
    assert case.queue.wait(10)
    assert [entry["state"] for entry in case.get("queue").json["ended"]] == ["done", "done"]
    assert case.get("status").json["state"] == "idle"


def test_a_status_asked_for_during_a_start_is_of_one_moment(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the new run's state beside the facts of the one before."""
    case.gate.let_go("before")
    case.post("start", {"settings": settings("before")})
    assert case.queue.wait(10)
    reached, go_on = threading.Event(), threading.Event()
    put = case.queue._store.put

    def slowly(entry: Any) -> None:
        reached.set()
        assert go_on.wait(60)
        put(entry)

    monkeypatch.setattr(case.queue._store, "put", slowly)
    with ThreadPoolExecutor() as threads:
        started = threads.submit(case.service.start, settings("after"))
        assert reached.wait(60)
        status = threads.submit(case.service.status)
        with contextlib.suppress(TimeoutError):
            status.result(0.2)
        go_on.set()
        found: Any = status.result(60)
        assert started.result(60)["position"] == 0
    expected = {"idle": "before", "running": "after"}
    assert found["run"]["name"] == expected[found["state"]]


def test_the_end_of_a_run_is_told_with_what_follows(case: Case) -> None:
    first, second = (case.post("start", {"settings": settings(name)}).json["id"] for name in ("one", "two"))
    case.gate.let_go("one")
    until(lambda: case.queue.running() and case.queue.running().name == "two")
    told = case.get("finished", f"id={first}").json
    following = case.queue.get(second)
    assert told["next"] == {"id": second, "started": following.started}
    assert (told["ended"], told["name"], told["state"], told["lora"]) == (True, "one", "done", "one.safetensors")
    case.gate.let_go("two")
    assert case.get("finished", f"id={second}").json["next"] is None
    assert case.get("finished", "id=nobody").json == {"ended": True, "next": None}


def test_all_problems_come_at_once_with_their_fields(case: Case) -> None:
    wrong = settings("a/b", network_rank="many", **{"image_size(height, width)": 7}, train_iterations=0)
    for path in ("start", "queue"):
        answer = case.post(path, {"settings": wrong})
        assert answer.status == 422
        fields = {problem["field"]: problem for problem in answer.json["problems"]}
        assert set(fields) == {"save_lora_name", "network_rank", "image_size(height, width)", "train_iterations"}
        size = fields["image_size(height, width)"]
        assert size["attribute"] == "image_size" and size["second"] is False and "32" in size["message"]
        assert fields["network_rank"]["value"] == "many"
    assert case.queue.waiting() == () and case.queue.running() is None


def test_problems_of_files_are_told_before_the_start(case: Case) -> None:
    case.backend.wrong = (Problem("save_lora_name", "x", "x.safetensors exists already."),)
    assert case.post("start", {"settings": settings()}).json["problems"][0]["message"].startswith("x.safetensors")
    typed = case.post("validate", {"settings": settings()}).json
    cost = {"steps": 1000, "before": 2.0, "per_step": None, "memory_mb": None}
    known = {"ok": True, "problems": [], "warnings": [], "cost": cost}
    assert typed == known, "while typing nothing is looked for on the disk"
    assert case.post("validate", {"settings": settings(train_iterations=0)}).json["cost"] is None
    assert case.post("validate", {"settings": settings(), "files": True}).json["ok"] is False
    case.backend.wrong = (
        Problem("save_lora_name", "x", "x.safetensors exists already."),
        Problem("train_iterations", 5, "does not fit the default that stands in for a wrong one."),
        Problem("lora_data_directory", "/nowhere", "does not exist."),
    )
    for body in ({"files": True}, {}):
        wrong = settings(train_iterations="abc", network_rank=0)
        answer = case.post("validate" if body else "start", {"settings": wrong, **body}).json
        fields = [problem["field"] for problem in answer["problems"]]
        assert sorted(fields) == ["lora_data_directory", "network_rank", "save_lora_name", "train_iterations"]
        if body:
            of_files = {problem["field"] for problem in answer["problems"] if problem["of_files"]}
            assert of_files == {"lora_data_directory", "save_lora_name"}


def test_a_duplicate_is_refused_at_its_field(case: Case) -> None:
    assert case.post("queue", {"settings": settings("same")}).status == 200
    again = case.post("queue", {"settings": settings("SAME")})
    assert again.status == 422 and [problem["field"] for problem in again.json["problems"]] == ["save_lora_name"]


def test_stop_and_stop_and_save(case: Case) -> None:
    nothing = case.post("stop")
    assert nothing.status == 409 and nothing.json == {"error": "Nothing is running.", "problems": []}
    for body, state in (({}, "stopped"), ({"save": True, "hold": True}, "saved_early")):
        case.post("start", {"settings": settings(state)})
        until(lambda: case.queue.live.facts() and case.queue.live.facts().step)
        assert case.post("stop", body).status == 200
        assert case.queue.wait(10)
        assert case.get("queue").json["ended"][0]["state"] == state
    assert case.get("queue").json["ended"][0]["lora"] == "saved_early.safetensors"


def test_editing_the_queue(case: Case) -> None:
    ids = [case.post("queue", {"settings": settings(name, network_rank=8)}).json["id"] for name in "abc"]
    moved = case.post("queue/move", {"id": ids[2], "to": 0})
    assert [entry["name"] for entry in moved.json["waiting"]] == ["c", "a", "b"]
    assert [entry["position"] for entry in moved.json["waiting"]] == [1, 2, 3]
    assert ["network rank", "8"] in moved.json["waiting"][0]["settings"]
    assert case.get(f"queue/{ids[0]}").json["settings"]["network_rank"] == 8
    assert names(case.queue.waiting()) == ["c", "a", "b"]
    case.post("queue/delete", {"id": ids[2]})
    gone = [case.get(f"queue/{ids[2]}"), case.post("queue/move", {"id": ids[2], "to": 0})]
    gone += [case.post(f"queue/{what}", {"id": ids[2]}) for what in ("delete", "run", "resume")]
    assert [answer.status for answer in gone] == [404] * 5
    sentence = f"There is no job '{ids[2]}' in the queue; it may have been deleted meanwhile."
    assert all(answer.json == {"error": sentence, "problems": []} for answer in gone)
    assert case.post("queue/run", {"id": ids[1]}).json["running"]["name"] == "b"
    assert case.post("queue/hold").json["going"] is False
    case.gate.let_go("b")
    assert case.queue.wait(10) and names(case.queue.waiting()) == ["a"]
    case.gate.let_go("a")
    assert case.post("queue/go").json["going"] is True
    assert case.queue.wait(10)
    assert case.post("queue/resume", {"id": ids[0]}).status == 409, "what is done does not go on"
    assert len(case.get("queue").json["ended"]) == 2 and case.post("queue/clear").json["ended"] == []


def test_a_finished_job_is_extended(case: Case) -> None:
    identity = case.post("start", {"settings": settings("done")}).json["id"]
    case.gate.let_go("done")
    assert case.queue.wait(10) and case.queue.get(identity).state == "done"
    assert case.post("queue/resume", {"id": identity}).json["error"].endswith("it is finished; extend it.")
    for given, status in (({}, 409), ({"network_rank": 8}, 422)):
        assert case.post("queue/extend", {"id": identity, "settings": given}).status == status
    case.gate.open.clear()
    answer = case.post("queue/extend", {"id": identity, "settings": {"train_iterations": 20}})
    assert answer.status == 200 and answer.json["running"]["id"] == identity
    again = case.post("queue/extend", {"id": identity, "settings": {"train_iterations": 30}})
    assert again.status == 409, "it is running"
    case.gate.let_go("done")
    assert case.queue.wait(10) and case.gate.ran[-1].resume and case.gate.ran[-1].job["train_iterations"] == 20


def test_status_gives_only_what_is_new(case: Case) -> None:
    case.post("start", {"settings": settings("run", train_batch_size=4)})
    until(lambda: case.queue.live.facts() and case.queue.live.facts().step)
    logs = case.host.places().logs
    live = case.queue.live
    live(step(2, loss=0.5))
    live(Sampled(2, (str(logs / "2026-11-21" / "run" / "samples" / "a b.png"),)))
    live(Saved(str(case.host.places().loras / "run_2steps.safetensors"), 2))
    first = case.get("status").json
    run, curve = first["run"], first["curve"]
    assert (run["step"], run["total"], run["loss"], run["progress"], run["seconds_left"]) == (2, 10, 0.5, 0.2, 8.0)
    assert run["samples"] == ["/atelier/v1/files/2026-11-21/run/samples/a b.png"]
    assert run["saved"] == [{"name": "run_2steps.safetensors", "step": 2, "final": False}]
    assert [point[:2] for point in curve["points"]] == [[1, 1.0], [2, 0.5]] and first["memory"]["used_mb"] == 100
    live(step(3, loss=0.25))
    live(Note("a line"))
    after = first["log"][-1]["seq"]
    new = case.get("status", f"revision={curve['revision']}&points=2&after={after}").json
    assert [point[0] for point in new["curve"]["points"]] == [3] and new["curve"]["from"] == 2
    assert [line["text"] for line in new["log"]] == ["a line"]
    events = case.get("events").json["events"]
    assert str(case.root) not in json.dumps([first, new, events]), "no path of this machine"
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert case.get("events", f"after={events[-1]['seq']}").json == {"events": []}
    assert case.get("status", "after=1e9").status == 400


def test_a_number_json_cannot_say_does_not_break_the_status(case: Case) -> None:
    case.post("start", {"settings": settings()})
    until(lambda: case.queue.live.facts() and case.queue.live.facts().step)
    case.queue.live(step(2, loss=math.inf))
    status = case.get("status")
    assert status.status == 200 and status.json["run"]["loss"] is None
    assert status.json["curve"]["points"][1][1] is None


def test_presets_and_settings(case: Case) -> None:
    assert case.get("presets").json == {"shipped": ["LoRA"], "own": []}
    assert case.get("presets/LoRA").json["settings"]["network_rank"] == 16
    assert case.get("presets/none").status == 422
    (case.root / "presets" / "demo.json").write_bytes((ROOT / "presets" / "demo.json").read_bytes())
    demo = case.get("presets/demo").json["settings"]
    assert (demo["model"], demo["lora_data_directory"]) == ("demo", str(BASE_PICTURES)) and demo["save_overwrite"]
    saved = case.post("presets/save", {"name": "mine", "settings": settings(network_rank=4)})
    assert saved.json["own"] == ["mine"]
    assert case.get("presets/mine").json["settings"]["network_rank"] == 4
    assert case.post("presets/save", {"name": "LoRA", "settings": settings()}).status == 422
    assert case.post("presets/delete", {"name": "LoRA"}).status == 422
    assert case.post("presets/delete", {"name": "mine"}).json["own"] == []
    folder = case.host.places().json / "2026-11-21"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"format": 1, **settings(network_rank=2)}))
    assert case.get("settings").json == {"files": ["2026-11-21/a.json"]}
    assert case.get("settings/2026-11-21/a.json").json["settings"]["network_rank"] == 2


def test_settings_are_kept_in_a_file(case: Case) -> None:
    names = [case.post("settings/save", {"settings": settings("mine", network_rank=3)}).json["name"] for _ in "ab"]
    assert len(set(names)) == 2 and all(name.split("/")[1].split("-")[1].startswith("mine") for name in names)
    assert case.get(f"settings/{names[1]}").json["settings"]["network_rank"] == 3
    assert case.post("settings/save", {"settings": settings("../x")}).status == 422


def test_settings_from_a_dropped_file(case: Case) -> None:
    text = json.dumps({"mode": "LoRA", "network_rank": "32", "image_size(height, width)": "768,512", "newer": 1})
    read = case.post("settings/read", {"text": text})
    assert read.json["settings"]["network_rank"] == 32 and "newer" in read.json["warnings"][0]
    header = {"__metadata__": {"atelier_job": json.dumps(settings(network_rank=12))}, "x.alpha": {}}
    read = case.post("settings/read", {"text": json.dumps(header)})
    assert read.json["settings"]["network_rank"] == 12 and "path" in read.json["warnings"][0]
    for text in ("no json", "[1]", json.dumps({"__metadata__": {"ss_network_dim": "4"}}), "[" * 100_000):
        assert case.post("settings/read", {"text": text}).status == 422


def test_the_table(case: Case) -> None:
    schema = case.get("schema", "mode=iLECO").json
    assert "CAME" in schema["unserved"]["train_optimizer"]
    fields = {field["attribute"]: field for field in schema["fields"]}
    assert set(case.service.catalogue.modes) == set(schema["modes"]) and schema["host"] == "fake"
    assert fields["original_prompt"]["visible"] and not fields["lora_data_directory"]["visible"]
    assert fields["network_rank"]["high"] == 1024 and fields["lora_data_directory"]["holds"] == "folder"
    assert len(fields) == len(case.service.catalogue.parameters) - 1
    assert case.get("schema", "mode=Nothing").status == 422


def test_models_and_folder(case: Case) -> None:
    models = case.get("models").json
    assert models["checkpoints"] == ["demo", "base.safetensors"] and models["loaded"] == "base.safetensors"
    assert case.post("models/refresh").json == models and case.host.refreshed == 1
    pictures = case.root / "pictures"
    pictures.mkdir()
    found = case.post("folder", {"settings": {"mode": "LoRA", "lora_data_directory": str(pictures)}})
    assert found.json == {"pictures": 12, "buckets": {"64x64": 12}, "mean": None, "where": "place"}
    missing = case.post("folder", {"settings": {"mode": "LoRA", "lora_data_directory": str(pictures / "no")}})
    assert missing.status == 422 and "no such folder" in missing.json["error"]


def test_every_route_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    for one in ENTRANCES:
        path = re.sub(r"\{(\w+)[^}]*\}", lambda found: found.group(1).upper(), one.path)
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{one.method} {path}` |")]
        body = set(re.findall(r"`(\w+)`", row.split("|")[2]))
        assert body == set(one.body), f"{one.method} {path}: the page says {body}, the route takes {one.body}"


def test_a_defect_is_told_without_its_inside(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, object]:
        raise KeyError(str(case.root))

    case.backend.memory = broken  # type: ignore[method-assign]
    answer = case.get("status")
    assert answer.status == 500 and str(case.root) not in answer.content.decode()
    assert "KeyError" in answer.json["error"] and str(case.root) in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- who may ask


def calls() -> list[tuple[str, str]]:
    """Every route with something in the place of names."""
    return [(one.method, one.path.replace("{id}", "x").replace("{name}", "x").replace("{name:path}", "x.png"))
            for one in ENTRANCES]  # fmt: skip


def send(case: Case, method: str, path: str, **headers: str) -> Any:
    return case.get(path, **headers) if method == "GET" else case.post(path, {}, **headers)


def test_every_route_asks_for_the_login(case: Case) -> None:
    case.host.password = "secret"
    for method, path in calls():
        refused = send(case, method, path)
        assert refused.status == 401 and refused.json == {"error": "Log in first.", "problems": []}, path
        assert send(case, method, path, cookie="word=wrong").status == 401, path
        assert send(case, method, path, cookie="word=secret").status != 401, path


@pytest.mark.parametrize(
    ("headers", "right"),
    [
        ({"origin": "https://example.com"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "same-site", "origin": "http://127.0.0.1:7860"}, False),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"sec_fetch_site": "same-origin", "origin": "https://behind.a.proxy"}, True),
        ({"origin": "https://outer.name", "x_forwarded_host": "outer.name"}, True),
        ({}, True),
    ],
)
def test_every_route_refuses_other_pages(case: Case, headers: dict[str, str], right: bool) -> None:
    for method, path in calls():
        assert (send(case, method, path, **headers).status != 403) == right, path


def test_every_writing_route_wants_json(case: Case) -> None:
    for path in (path for method, path in calls() if method == "POST"):
        refuse_all_but_json(case, path)


def refuse_all_but_json(case: Case, path: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert case.post(path, {}, content_type=kind).status == 415
    for body in (b"", b"{", b"[]", b'"text"', b"\xff", b'{"a": NaN}', b"[" * 50_000):
        assert case.post(path, body).status == 400
    assert case.post(path, {"settings": {}, "surprise": 1}).status == 400


def test_wrong_kinds_in_the_body(case: Case) -> None:
    for path, body in (
        ("start", {"settings": [1]}),
        ("start", {}),
        ("stop", {"save": "yes"}),
        ("queue/move", {"id": "x", "to": "0"}),
        ("queue/move", {"id": "x", "to": True}),
        ("queue/delete", {"id": 3}),
        ("presets/delete", {"name": None}),
    ):
        assert case.post(path, body).status == 400, (path, body)
    assert case.post("start", {"settings": {"mode": 3, "network_rank": {"a": 1}}}).status == 422


def test_a_body_too_large_is_not_read(case: Case) -> None:
    assert case.post("start", b" " * (16 * 2**20 + 1)).status == 413


def test_routes_come_first_and_only_once(case: Case) -> None:
    async def anything() -> str:
        return "another page"

    case.app.add_api_route("/{page:path}", anything)
    count = len(case.app.router.routes)
    add_routes(case.app, case.service)
    assert len(case.app.router.routes) == count
    assert case.get("status").json["state"] == "idle" and case.client.get("/other").json == "another page"


def test_nothing_is_kept_by_browsers(case: Case) -> None:
    headers = case.get("status").headers
    assert headers["cache-control"] == "no-store" and headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
