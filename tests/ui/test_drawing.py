"""Routes that answer with pictures, and the parts of the page: what they draw and write, and what they refuse."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pandas")
from asgi import Client
from data_pictures import noise
from PIL import Image
from queue_case import step, until
from service_case import Case, make, settings

from trainer.errors import BusyError
from trainer.ui.drawing import ASSETS
from trainer.ui.plot import live_log
from trainer.ui.wish import Wish


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = make(tmp_path / "host")
    yield made
    made.queue.close()


def fields(answer: Any) -> list[str]:
    assert answer.status == 422, answer.content
    return [problem["field"] for problem in answer.json["problems"]]


def picture_of(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/png;base64,"))))


def write_log(case: Case, name: str, losses: list[float]) -> None:
    path = case.host.places().logs / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{loss},0.001" for step, loss in enumerate(losses, 1)]
    path.write_text("\n".join(["network_rank,4", "Step,Loss,Learning Rate 1", *rows, ""]), encoding="utf-8")


def test_plots_show_the_logs_asked_for(case: Case) -> None:
    assert "no log yet" in case.post("plot", {"smoothing": "0.9"}).json["error"]
    write_log(case, "2026-01-01/a/a.csv", [1.0, 0.5])
    write_log(case, "2026-01-02/b/b.csv", [0.25, 0.125])
    latest = case.get("logs").json["logs"][0]
    assert case.post("plot", {"smoothing": "0.9"}).json["shown"] == [latest]
    both = case.post("plot", {"logs": ["2026-01-02/b/b.csv", "2026-01-01/a/a.csv"], "smoothing": 0.5, "rates": False})
    assert both.json["shown"] == ["2026-01-02/b/b.csv", "2026-01-01/a/a.csv"]
    assert both.json["svg"].count('id="atelier_loss_') == 2
    text = "Step,Loss\n1,0.5\n2,0.25\n"
    assert case.post("plot", {"dropped": [{"name": "mine.csv", "text": text}]}).json["shown"] == ["mine.csv"]
    assert fields(case.post("plot", {"smoothing": "1"})) == ["smoothing"]
    (case.root / "secret.csv").write_text("Step,Loss\n1,1\n")
    for name in ("../../secret.csv", str(case.root / "secret.csv"), "..\\secret.csv"):
        assert case.post("plot", {"logs": [name]}).status == 404
    assert case.post("plot", {"logs": "a"}).status == 422 and case.post("plot", {"colour": "red"}).status == 400


def test_a_run_that_writes_no_log_is_shown_while_it_is_the_latest(case: Case) -> None:
    write_log(case, "2026-01-01/a/a.csv", [1.0, 0.5])
    os.utime(case.host.places().logs / "2026-01-01/a/a.csv", (0, 0))
    case.post("start", {"settings": settings("silent")})
    until(lambda: case.queue.live.facts() and case.queue.live.facts().step)
    for number, loss in ((2, 0.5), (3, 0.25)):
        case.queue.live(step(number, loss=loss))
    answer = case.post("plot", {"smoothing": "0"}).json
    assert answer["shown"] == ["silent"] and answer["svg"].count('id="atelier_loss_') == 1
    drawn = live_log("x", case.queue.live.curve()["points"]).rows  # type: ignore[arg-type]
    assert drawn.to_numpy().tolist() == [[1, 1.0, 1e-4], [2, 0.5, 1e-4], [3, 0.25, 1e-4]]
    case.gate.let_go("silent")
    assert case.queue.wait(10)
    assert case.post("plot", {"smoothing": "0"}).json["shown"] == ["silent"]
    write_log(case, "2026-01-02/b/b.csv", [0.25, 0.125])
    assert case.post("plot", {"smoothing": "0"}).json["shown"] == ["2026-01-02/b/b.csv"]


def test_pictures_are_written_into_new_folders_of_ours(case: Case, tmp_path: Path) -> None:
    source = tmp_path / "cats"
    source.mkdir()
    noise((40, 30)).save(source / "cat.png")
    (source / "cat.txt").write_text("a cat")
    wish = {"source": str(source), "resolutions": "16x16,32x32", "divisible": 4}
    shown = case.post("images/resize/preview", wish).json["pictures"]
    assert [one["name"] for one in shown] == ["cat+16x16.png", "cat+32x32.png"]
    assert [picture_of(one["data"]).size for one in shown] == [(16, 12), (36, 24)]
    images = case.host.places().logs / "images"
    assert not images.exists(), "a preview writes nothing"
    first, second = case.post("images/resize", wish).json, case.post("images/resize", wish).json
    assert first == {"written": 2, "folder": str(images / "cats")} and second["folder"] == str(images / "cats-1")
    assert sorted(path.name for path in (images / "cats").iterdir()) == [
        "cat+16x16.png", "cat+16x16.txt", "cat+32x32.png", "cat+32x32.txt",
    ]  # fmt: skip
    turned = case.post("images/augment", {"source": str(source), "copies": "3", "angle": 10, "output": "more"}).json
    assert turned == {"written": 3, "folder": str(images / "more")}
    assert len(case.post("images/augment/preview", {"source": str(source), "copies": 2}).json["pictures"]) == 2


def test_names_of_folders_lead_nowhere_else(case: Case, tmp_path: Path) -> None:
    noise((8, 8)).save(tmp_path / "a.png")
    for name in ("../../up", "/tmp/up", "C:\\up", "con", "a/b"):
        wish = {"source": str(tmp_path / "a.png"), "resolutions": "8x8", "output": name}
        assert fields(case.post("images/resize", wish)) == ["output"], name
    assert fields(case.post("images/resize", {"source": "", "resolutions": "8x8"})) == ["source"]
    case.host.listens_beyond_loopback = True
    wish = {"source": str(tmp_path), "resolutions": "8x8"}
    assert fields(case.post("images/resize", wish)) == ["source"]
    case.host.data_root = tmp_path
    assert case.post("images/resize", wish).json["written"] == 1


def test_dropped_pictures_are_kept_and_nothing_else(case: Case) -> None:
    data = io.BytesIO()
    noise((12, 10)).save(data, format="PNG")
    sent = base64.b64encode(data.getvalue()).decode()
    first = case.post("upload", {"name": "C:\\pictures\\Cat.PNG", "data": sent}).json["path"]
    second = case.post("upload", {"name": "../Cat.PNG", "data": sent}).json["path"]
    images = case.host.places().logs / "images"
    assert Path(first).parent.parent == images and Path(first).name == "Cat.png" and Path(second).name == "Cat-1.png"
    assert Image.open(first).size == (12, 10)
    for name, content in (("run.exe", sent), ("a.png", "%%%"), ("a.png", sent[:40]), ("a.png", "")):
        assert case.post("upload", {"name": name, "data": content}).status == 422, name
    assert len(list(images.rglob("*.*"))) == 2


def test_pictures_of_one_name_that_come_at_once_are_all_kept(case: Case) -> None:
    """And so are folders of one name."""
    sent = []
    for number in range(8):
        data = io.BytesIO()
        noise((12, 10), number).save(data, format="PNG")
        sent.append(data.getvalue())
    start, paths, folders = threading.Barrier(8), [], []

    def drop(content: bytes) -> None:
        body = {"name": "cat.png", "data": base64.b64encode(content).decode()}
        wish = {"source": "", "resolutions": "8x8", "output": "small"}
        client = Client(case.app)
        start.wait()
        path = client.post("/atelier/v1/upload", body).json["path"]
        paths.append(path)
        folders.append(client.post("/atelier/v1/images/resize", {**wish, "source": path}).json["folder"])
        client.close()

    threads = [threading.Thread(target=drop, args=(content,)) for content in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Path(path).read_bytes() for path in paths) == sorted(sent) and len(set(folders)) == 8


def test_pictures_of_prompts_are_checked_and_drawn(case: Case) -> None:
    asked: list[Wish] = []

    def draw(wish: Wish) -> Image.Image:
        asked.append(wish)
        return Image.new("RGB", (wish.size[1], wish.size[0]), (1, 2, 3))

    case.backend.picture = draw  # type: ignore[attr-defined]
    wish = {"prompt": "a cat", "seed": "7", "steps": 4, "cfg": "2.5", "width": 24, "height": "16", "strength": "-1"}
    drawn = picture_of(case.post("picture", {**wish, "lora": "cat"}).json["data"])
    assert drawn.size == (24, 16) and drawn.getpixel((0, 0)) == (1, 2, 3)
    assert asked == [Wish("a cat", "", seed=7, size=(16, 24), steps=4, cfg=2.5, lora="cat", strength=-1.0, model="")]
    bad = {**wish, "seed": "-1", "steps": "1.5", "width": "20", "height": "9000", "cfg": "x", "strength": "11"}
    assert sorted(fields(case.post("picture", bad))) == ["cfg", "height", "seed", "steps", "strength", "width"]
    assert len(asked) == 1

    def training(wish: Wish) -> Image.Image:
        raise BusyError("It trains.")

    case.backend.picture = training  # type: ignore[attr-defined]
    busy = case.post("picture", wish)
    assert (busy.status, busy.json) == (409, {"error": "It trains.", "problems": []})


def test_the_end_of_a_run_is_waited_for_without_a_thread(case: Case) -> None:
    identity = case.post("start", {"settings": settings("one")}).json["id"]
    answers: list[Any] = []

    def wait() -> None:
        answers.append(Client(case.app).get("/atelier/v1/finished", f"id={identity}"))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    before = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not answers
    case.gate.let_go("one")
    until(lambda: len(answers) == 3)
    assert time.monotonic() - before < 5
    assert {(answer.json["ended"], answer.json["state"]) for answer in answers} == {(True, "done")}
    assert case.client.get("/atelier/v1/finished", "id=unknown").json == {"ended": True, "next": None}


def test_reload_ui_need_not_wait_for_the_end_of_a_run(case: Case) -> None:
    """gradio tells its server to end and then waits for the answer of every request."""
    server = types.SimpleNamespace(should_exit=False)
    case.app.blocks = types.SimpleNamespace(server=server)
    identity = case.post("start", {"settings": settings("one")}).json["id"]
    until(lambda: case.gate.ran)
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(Client(case.app).get("/atelier/v1/finished", f"id={identity}"))
    )
    asking.start()
    time.sleep(0.3)
    assert not answers
    server.should_exit = True
    asking.join(5)
    assert answers and answers[0].json == {"ended": False}
    assert case.get("status").json["state"] == "running"
    case.gate.let_go("one")


def test_the_page_gets_its_parts_and_no_other_files(case: Case) -> None:
    for name, path in ASSETS.items():
        assert case.get(f"assets/{name}").content == path.read_bytes()
    assert {"atelier.js", "style.css", "ja_JP.json"} <= set(ASSETS)
    for name in ("launch.py", "..%2Flaunch.py", "demo.json"):
        assert case.get(f"assets/{name}").status == 404
    case.host.password = "word"
    assert case.get("assets/atelier.js").status == 401
