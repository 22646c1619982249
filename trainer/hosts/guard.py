"""The door of the standalone app: the addresses it answers to, its password, what may be sent and by whom, in front of
pages and routes alike.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .access import right_login
from .brake import Brake

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
BODY_SECONDS = 30.0
"""Seconds that a sender may pause within a body."""

UNFRAMED = ((b"x-frame-options", b"DENY"), (b"content-security-policy", b"frame-ancestors 'none'"))

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Headers = Mapping[str, str]

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:\d{0,5})?")


@dataclass(frozen=True)
class Sending:
    """Who may send, where and how much. `same_origin` tells from the headers whether a request comes from a page of
    ours or from no page. Only below `writable` something may be sent, up to `largest` bytes.
    """

    same_origin: Callable[[Headers], bool] = lambda headers: True
    writable: str = "/"
    largest: int = 16 * 1024 * 1024


class Guard:
    """An ASGI application in front of another one.

    `names`: the host names a request may be addressed to, None for any. A page elsewhere can make its own name point to
    this machine and would then pass as the same origin; its name gives it away. `login`: `name:password` that HTTP
    basic authentication must bring, "" for none.
    """

    def __init__(
        self,
        app: Any,
        names: Collection[str] | None,
        login: str = "",
        sending: Sending | None = None,
        brake: Brake | None = None,
    ) -> None:
        self._app, self._login = app, login
        self._names = None if names is None else frozenset(name.lower() for name in names)
        self._sending, self._brake = sending or Sending(), brake or Brake()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers) or await self._wrong_login(scope, headers)
        if refused:
            await _refuse(scope, send, *refused)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, send)
        else:
            await self._app(scope, _patient(receive, self._sending.largest), _unframed(send))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence when a request is refused whoever sent it."""
        if self._names is not None and host_name(headers.get("host", "")) not in self._names:
            text = "This address is not known here. Open the one that was printed, or start with --allow-host NAME."
            return 403, text
        if not self._sending.same_origin(headers) and not _opens_the_page(scope, headers):
            return 403, "The request comes from another page."
        if scope["type"] == "http" and scope["method"] not in READING:
            size = headers.get("content-length", "0")
            if not str(scope["path"]).startswith(self._sending.writable):
                return 405, "Nothing can be sent here."
            if not size.isdecimal() or len(size) > 15 or int(size) > self._sending.largest:
                return 413, f"The body is larger than {self._sending.largest // 2**20} MiB."
        return None

    async def _wrong_login(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """The refusal of who does not bring the password, after a while where it was a wrong one."""
        given = headers.get("authorization", "")
        if not self._login:
            return None
        if not given:
            return 401, "Log in first."
        address = str((scope.get("client") or ("",))[0])
        if not await self._brake.turn(address):
            return 429, "Too many wrong passwords came from this address. Try again in a minute."
        if right_login(given, self._login):
            self._brake.right(address)
            return None
        await self._brake.wrong(address)
        return 401, "Log in first."


def host_name(header: str) -> str:
    """The name of a Host header, without its port, in lower case; "" when it is none."""
    found = _HOST.fullmatch(header.strip().lower())
    return found[1] if found else ""


def _opens_the_page(scope: Scope, headers: Headers) -> bool:
    """Whether somebody followed a link to us: a browser opens a whole page, which asks for nothing but to be seen."""
    wanted = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and wanted == ("navigate", "document")


def _patient(receive: Receive, largest: int) -> Receive:
    """`receive` for a body of at most `largest` bytes whose sender does not pause too long; else it was broken off."""
    taken, whole = 0, False

    async def limited() -> Mapping[str, Any]:
        nonlocal taken, whole
        if whole:
            return await receive()
        if taken > largest:
            return {"type": "http.disconnect"}
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except asyncio.TimeoutError:
            return {"type": "http.disconnect"}
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        return message

    return limited


def _unframed(send: Send) -> Send:
    """`send` with headers that keep other pages from showing ours in a frame."""

    async def sent(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *UNFRAMED]}
        await send(message)

    return sent


async def _refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *UNFRAMED]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Atelier", charset="UTF-8"'))
    if status in (405, 413):
        headers.append((b"connection", b"close"))  # what is still being sent is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
