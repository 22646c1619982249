"""The door of the standalone app: the addresses it answers to and its password, in front of pages and routes alike."""
from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from .access import right_login

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application in front of another one.

    `names`: the host names a request may be addressed to, None for any. A page elsewhere can make its own name point to
    this machine and would then pass as the same origin; its name gives it away. `login`: `name:password` that HTTP
    basic authentication must bring, "" for none.
    """

    def __init__(self, app: Any, names: Collection[str] | None, login: str = "") -> None:
        self._app, self._login = app, login
        self._names = None if names is None else frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._names is not None and host_name(headers.get(b"host", "")) not in self._names:
            text = "This address is not known here. Open the one that was printed, or start with --allow-host NAME."
            await _refuse(scope, send, 403, text)
        elif self._login and not right_login(headers.get(b"authorization", ""), self._login):
            await _refuse(scope, send, 401, "Log in first.")
        else:
            await self._app(scope, receive, send)


def host_name(header: str) -> str:
    """The name of a Host header, without its port, in lower case."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[: header.find("]") + 1]
    return header.partition(":")[0]


async def _refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Atelier", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
