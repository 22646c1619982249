"""The standalone app: its door, its port, and one real training from click to file through the routes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from asgi import Client
from fastapi import FastAPI
from queue_case import until
from safetensors import safe_open

from trainer.cli.app import EVERYWHERE, FIRST_PORT, LOOPBACK, AppOptions, bind, greeting
from trainer.cli.main import main
from trainer.cli.service import make_service
from trainer.errors import AtelierError
from trainer.hosts.brake import Brake
from trainer.hosts.guard import LOCAL_NAMES, Guard, Sending, host_name
from trainer.hosts.standalone import Standalone
from trainer.params.job import Job
from trainer.places import BASE_PICTURES, Places
from trainer.ui.api import add_routes
from trainer.ui.http import same_origin
from trainer.ui.wish import Wish

# ------------------------------------------------------------------------------------------------------ the door


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:7860", 200),
        ("my.machine:7860", 200),
        ("attacker.example:7860", 403),
        ("127.0.0.1.attacker.example", 403),
        ("", 403),
        ("[::1", 403),
        ("192.168.0.5:7860", 403),
        ("[::1].evil.com", 403),
        ("[::1]evil.com:80", 403),
        ("127.0.0.1:80.evil.com", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    app = Guard(_hello, {*LOCAL_NAMES, "My.Machine"})
    assert Client(app, host).get("/anything").status == status


def test_any_name_when_it_listens_for_others() -> None:
    assert Client(Guard(_hello, None), "192.168.0.5:7860").get("/").content == b"hello"


def test_a_password_stands_before_everything() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    client = Client(Guard(_hello, None, "me:pässword: with colon", brake=Brake(sleep=sleep)))

    def ask(header: str) -> int:
        return client.get("/", authorization=header).status

    def basic(text: str) -> str:
        return "Basic " + base64.b64encode(text.encode()).decode()

    assert ask(basic("me:pässword: with colon")) == 200 == ask(basic("me:pässword: with colon").replace("B", "b", 1))
    assert not slept
    given = ("Basic", "Basic !!!", "Basic \xff", "B\xe4sic x", "Bearer x", basic("me:"), basic("me:other"))
    for wrong in ("", *given):
        assert ask(wrong) == 401, wrong
    assert len(slept) >= len(given) and min(slept) > 0.5, "each wrong one takes its time"
    refused = client.get("/")
    assert refused.headers["www-authenticate"].startswith("Basic realm=")


def test_tries_from_one_address_wait_for_each_other_and_others_do_not() -> None:
    now, asked = [0.0], []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        now[0] += seconds
        await asyncio.sleep(0)

    async def guess() -> None:
        brake = Brake(lambda: now[0], sleep)
        start = now[0]
        for _ in range(30):
            assert await brake.turn("attacker")
            await brake.wrong("attacker")
        assert 30 <= now[0] - start <= 90
        before = len(asked)
        assert await brake.turn("somebody else") and len(asked) == before
        brake.right("attacker")
        assert await brake.turn("attacker") and len(asked) == before, "who knows the password is not held up"

    async def at_once() -> None:
        never = asyncio.Event()

        async def wait(seconds: float) -> None:
            if seconds > 1.5:
                await never.wait()

        brake = Brake(lambda: 5.0, wait)
        for _ in range(5):
            await brake.wrong("attacker")
        assert await brake.turn("attacker")
        tries = [asyncio.create_task(brake.turn("attacker")) for _ in range(100)]
        await asyncio.sleep(0.01)
        assert sum(task.done() and not task.result() for task in tries) == 90
        never.set()
        await asyncio.gather(*tries)

    asyncio.run(guess())
    asyncio.run(at_once())


def test_pages_elsewhere_can_send_nothing_and_show_no_frame() -> None:
    guard = Guard(_hello, LOCAL_NAMES, sending=Sending(same_origin, writable="/atelier/v1/", largest=100))
    client = Client(guard)
    foreign = [
        {"sec_fetch_site": "cross-site", "origin": "http://evil.com"}, {"sec_fetch_site": "same-site"},
        {"origin": "http://evil.com"}, {"origin": "null"},
    ]  # fmt: skip
    form = {"content_type": "multipart/form-data; boundary=x"}
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/queue/join", "/run/predict", "/atelier/v1/start", "/"):
        for headers in foreign:
            assert client.post(path, b"--x", **headers, **form).status == 403, (path, headers)
            assert client.send("GET", path, b"", "", headers).status == 403, (path, headers)
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/login"):
        assert client.post(path, b"--x", sec_fetch_site="same-origin", **form).status == 405, path
    full = client.post("/atelier/v1/start", b"x" * 100, sec_fetch_site="same-origin", content_length="100")
    assert full.status == 200
    for size in ("101", "-1", "1" * 5000, "x"):
        assert client.post("/atelier/v1/start", b"x", content_length=size).status == 413
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    followed = client.send("GET", "/", b"", "", {**link, "sec_fetch_dest": "document"})
    assert followed.status == 200, "a link to the page is no attack"
    assert client.send("GET", "/", b"", "", {**link, "sec_fetch_dest": "iframe"}).status == 403
    for answer in (followed, client.get("/", origin="http://evil.com")):
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"


def test_a_body_that_grows_without_end_is_broken_off() -> None:
    taken: list[int] = []

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            taken.append(len(message["body"]))
        await _hello(scope, receive, send)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(reads, LOCAL_NAMES, sending=Sending(largest=100))(scope, receive, send))
    assert sum(taken) == 110


def test_a_websocket_is_refused_too() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "headers": [(b"Host", b"attacker.example")]}
    asyncio.run(Guard(_hello, LOCAL_NAMES)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_routes_ask_for_the_password_themselves(tmp_path: Path) -> None:
    """Also where the door is not in front of them."""
    app = FastAPI()
    places = Places.standalone(tmp_path / "models").under(tmp_path / "out")
    service = make_service(Standalone(places, login="me:word"))
    add_routes(app, service)
    client = Client(app)
    right = "Basic " + base64.b64encode(b"me:word").decode()
    wrong = "Basic " + base64.b64encode(b"me:other").decode()
    asked = [client.get("/atelier/v1/models", authorization=header).status for header in ("", wrong, right)]
    assert asked == [401, 401, 200]
    service.queue.close(60)


def test_what_is_no_request_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, LOCAL_NAMES, "a:b")({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"] and host_name(" [::1]:80 ") == "[::1]"


# ------------------------------------------------------------------------------------------------------ the port


def test_it_listens_on_this_machine_alone() -> None:
    with bind(LOOPBACK, 0) as found:
        address, port = found.getsockname()
        assert address == "127.0.0.1" and port >= FIRST_PORT
        with contextlib.closing(socket.create_connection((address, port), 5)):
            pass
        with bind(LOOPBACK, 0) as second:
            assert second.getsockname()[1] > port
        with pytest.raises(AtelierError, match=rf"Port {port} cannot be used.*--port"):
            bind(LOOPBACK, port)


def test_who_sends_half_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """And a client that leaves in the middle of a body leaves no traceback."""
    from trainer.cli import server as server_module

    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.6)
        await _hello(scope, receive, send)

    async def nothing() -> None:
        pass

    with bind(LOOPBACK, 0) as listening:
        ready = threading.Event()
        server = server_module.Server(server_module.config(slow), ready.set, nothing)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(30)
            halves = [socket.create_connection(listening.getsockname(), 20) for _ in range(20)]
            for number, half in enumerate(halves):
                half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "[: 2 * number])
            assert [half.recv(10) for half in halves] == [b""] * 20
            with contextlib.closing(socket.create_connection(listening.getsockname(), 20)) as whole:
                for _ in range(2):
                    whole.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    answer = b""
                    while b"0\r\n\r\n" not in answer:
                        part = whole.recv(1000)
                        assert part, "a long answer is waited for"
                        answer += part
                    assert answer.startswith(b"HTTP/1.1 200") and b"hello" in answer
        finally:
            server.should_exit = True
            thread.join(30)
            for half in halves:
                half.close()
    assert "Traceback" not in capfd.readouterr().err


def test_all_that_files_tell_is_told_at_once_each_at_its_field(tmp_path: Path) -> None:
    places = Places.standalone(tmp_path / "models").under(tmp_path / "out")
    service = make_service(Standalone(places))
    places.loras.mkdir(parents=True)
    (places.loras / "cat.safetensors").touch()
    wrong = {
        "format": 1, "mode": "LoRA", "save_lora_name": "cat", "lora_data_directory": "/nowhere", "model": "none",
        "train_iterations": "abc",
    }  # fmt: skip
    found = service.check(wrong).problems
    fields = sorted(problem.field for problem in found)
    assert fields == ["lora_data_directory", "model", "save_lora_name", "train_iterations"]
    told = next(str(problem) for problem in found if problem.field == "lora_data_directory")
    assert told.count("lora_data_directory") == 1 and told.count("nowhere") == 1
    pictures = sorted(BASE_PICTURES.glob("*.png"))[:1]
    same = {"mode": "ADDifT", "original image": str(pictures[0]), "target image": str(pictures[0])}
    (one,) = service.check({"format": 1, "save_lora_name": "dog", **same}).problems
    assert one.field == "target image"
    service.queue.close(60)


def test_a_client_that_leaves_within_a_body_is_no_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = FastAPI()
    service = make_service(Standalone(Places.standalone(tmp_path / "models").under(tmp_path / "out")))
    add_routes(app, service)
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/atelier/v1/validate", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400 and "Traceback" not in capsys.readouterr().err
    service.queue.close(60)


def test_what_is_printed_says_who_can_reach_it(tmp_path: Path) -> None:
    places = Places.standalone(tmp_path)
    assert greeting(8000, AppOptions(places)) == "Atelier runs at http://127.0.0.1:8000 (end it with Ctrl+C)"
    told = greeting(8000, AppOptions(places, listen=True))
    assert "every interface" in told and "--auth" in told and "--data-root" in told
    told = greeting(8000, AppOptions(places, listen=True, login="a:b", data_root=tmp_path))
    assert "--auth" not in told and "--data-root" not in told and EVERYWHERE == "0.0.0.0"


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--port", "0"], ["--port", "99999"], ["--port", "x"], ["--unknown"]):
        with pytest.raises(SystemExit) as left:
            main(["app", *words])
        assert left.value.code == 2
    assert main(["app", "--data-root", str(tmp_path / "missing")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_every_word_of_the_start_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AppOptions] = []
    monkeypatch.setattr("trainer.cli.app.serve", lambda options: seen.append(options) or 0)
    monkeypatch.delenv("ATELIER_AUTH", raising=False)
    folders = {name: tmp_path / name for name in ("models", "ckpt", "vae", "lora", "output")}
    words = [word for name, path in folders.items() for word in (f"--{name}-dir", str(path))]
    words += ["--port", "7000", "--listen", "--data-root", str(tmp_path), "--auth", "me:word"]
    assert main(["app", *words, "--allow-host", "one", "--allow-host", "two"]) == 0
    assert main(["app"]) == 0
    (full, bare) = seen
    assert (full.port, full.listen, full.data_root) == (7000, True, tmp_path)
    assert (full.login, full.names) == ("me:word", ("one", "two"))
    places = full.places
    chosen = (places.checkpoints, places.vaes, places.loras)
    assert chosen == (folders["ckpt"], folders["vae"], folders["lora"])
    assert places.text_encoders.is_relative_to(folders["models"]) and places.logs.is_relative_to(folders["output"])
    assert bare == AppOptions(Places.standalone())
    monkeypatch.setenv("ATELIER_AUTH", "you:word")
    assert main(["app", "--models-dir", str(tmp_path)]) == 0
    assert seen[2].login == "you:word" and seen[2].places == Places.standalone(tmp_path)


# ------------------------------------------------------------------------------------------------ a real training


class Home(Standalone):
    """The standalone host, which counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(Places.standalone(root / "models").under(root / "out"))
        self.asked: list[str] = []

    @contextlib.contextmanager
    def borrow(self, job: Job, log: Any) -> Iterator[None]:
        self.asked.append("borrow")
        with super().borrow(job, log) as model:
            try:
                yield model
            finally:
                self.asked.append("give back")

    def refresh_loras(self) -> None:
        self.asked.append("refresh")


def job(name: str, **more: object) -> dict[str, object]:
    return {
        "mode": "LoRA", "model": "demo", "lora_data_directory": str(BASE_PICTURES), "save_lora_name": name,
        "network_rank": 4, "network_targets": "unet", "network_element": "CrossAttention",
        "image_size(height, width)": 64, "image_buckets_step": 64, "image_min_length": 64, "train_batch_size": 2,
        "train_iterations": 2, "train_model_precision": "fp32", "train_seed": 1, "logging_save_csv": True,
        "sample_prompts": "a flamingo circle", "sample_every": 2, "sample_steps": 1, "sample_cfg": 1, **more,
    }  # fmt: skip


def test_from_click_to_file(tmp_path: Path) -> None:
    host = Home(tmp_path)
    service = make_service(host)
    app = FastAPI()
    add_routes(app, service)
    client = Client(app)

    def post(path: str, body: object = None) -> Any:
        return client.post(f"/atelier/v1/{path}", body)

    def status(query: str = "") -> Any:
        return client.get("/atelier/v1/status", query).json

    looked = post("folder", {"settings": job("x")}).json
    assert looked["pictures"] == 12 and looked["captions missing"] == 0 and looked["steps per epoch"] == 6
    refused = post("start", {"settings": job("x", model="nothing", lora_data_directory=str(tmp_path / "none"))})
    assert {problem["field"] for problem in refused.json["problems"]} == {"model", "lora_data_directory"}

    often = {"sample_every": 0, "train_state_every": 2, "train_batch_size": 1}  # losses are told before each state
    assert post("start", {"settings": job("first")}).json["position"] == 0
    assert post("start", {"settings": job("second", train_iterations=100_000, **often)}).json["position"] == 1
    until(lambda: service.queue.ended(), 300, 0.05)
    first = service.queue.ended()[0]
    assert first.state == "done", first.error
    assert first.path == str(host.places().loras / "first.safetensors") and (first.step, first.total) == (2, 2)
    assert host.asked[:3] == ["borrow", "give back", "refresh"]
    with safe_open(first.path, "pt") as file:
        held = json.loads(file.metadata()["atelier_job"])
    assert held["network_rank"] == 4 and str(tmp_path) not in json.dumps(held)
    read = post("settings/read", {"text": json.dumps({"__metadata__": {"atelier_job": json.dumps(held)}})})
    assert read.json["settings"]["train_iterations"] == 2
    (log,) = [name for name in client.get("/atelier/v1/logs").json["logs"] if name.endswith("first.csv")]
    assert client.get(f"/atelier/v1/logs/{log}").content.count(b"\n") >= 8 + 1 + 2
    told = client.get("/atelier/v1/events").json["events"]
    drawn = [event["paths"][0] for event in told if event["event"] == "sampled"]
    picture = client.get(drawn[0])
    assert len(drawn) == 1 and picture.status == 200 and picture.content[:4] == b"\x89PNG"

    until(lambda: (run := status()["run"])["name"] == "second" and run["step"] >= 2, 300, 0.05)
    told = status()
    assert (told["run"]["name"], told["run"]["total"]) == ("second", 100_000) and told["memory"]["used_mb"] > 100
    assert post("start", {"settings": job("first")}).json["problems"][0]["field"] == "save_lora_name", "file is there"
    post("stop")
    assert service.queue.wait(300)
    second = service.queue.ended()[0]
    assert second.state == "stopped" and second.path == "" and second.step >= 2
    listed = client.get("/atelier/v1/queue").json["ended"][0]
    assert listed["resumable"] and listed["folder"].endswith("-second")

    assert post("queue/resume", {"id": second.id}).status == 200
    until(lambda: service.queue.live.facts().step > second.step, 300, 0.05)  # type: ignore[union-attr]
    assert any("Resuming after step" in line["text"] for line in status()["log"])
    post("stop", {"save": True})
    assert service.queue.wait(300)
    saved = service.queue.ended()[0]
    assert (saved.id, saved.state, saved.folder) == (second.id, "saved_early", second.folder)
    assert Path(saved.path).is_file() and host.asked.count("borrow") == host.asked.count("give back") == 3

    wish = Wish("a red circle", size=(64, 64), steps=1, model="demo")
    wishes = (wish, replace(wish, lora="first.safetensors"), replace(wish, lora="first", strength=0.0))
    plain, worn, away = map(service.backend.picture, wishes)
    assert plain.size == (64, 64) and plain.tobytes() == away.tobytes() != worn.tobytes()
    assert service.queue.close(60)
