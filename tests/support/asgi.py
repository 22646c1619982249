"""Requests to an ASGI application without a server or a client library, whose versions differ between WebUIs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """Speaks to `app` as a page of `http://127.0.0.1:7860` would."""

    def __init__(self, app: Any, host: str = "127.0.0.1:7860") -> None:
        self.app, self.host = app, host
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.close()

    def get(self, path: str, query: str = "", **headers: str) -> Answer:
        return self.send("GET", path, b"", query, headers)

    def post(self, path: str, body: object = None, **headers: str) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        return self.send("POST", path, content, "", {"content_type": "application/json", **headers})

    def send(self, method: str, path: str, body: bytes, query: str, headers: dict[str, str]) -> Answer:
        """`headers` are named with `_` for `-`; `path` is taken as it is, without being made right."""
        whole = {"host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": quote(path).encode(), "root_path": "", "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in whole.items()],
            "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 7860),
        }  # fmt: skip
        return self._loop.run_until_complete(self._send(scope, body))

    async def _send(self, scope: dict[str, Any], body: bytes) -> Answer:
        start: dict[str, Any] = {}
        parts: list[bytes] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.sleep(60)
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self.app(scope, receive, send)
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, b"".join(parts))
