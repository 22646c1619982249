"""What every route does before it answers: the host's own login, the same origin, JSON. Plain requests and responses,
which the oldest FastAPI that a WebUI brings and the newest understand alike.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

from ..errors import AtelierError, BusyError, JobError
from ..jobs.listing import QueueError, UnknownJobError
from ..jsontext import JsonError, parse
from ..params.catalogue import Catalogue
from ..params.files import LARGEST_FILE
from .fence import NotServedError
from .views import problems

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
WRITES = frozenset({"POST"})
WRONG_SECONDS = 1.0
"""Seconds before a wrong password is answered."""


class RequestError(AtelierError):
    """A request that is not answered; `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Call:
    """One request as a handler sees it: parts of the path, the query, the JSON body.

    `leaving` tells whether the server wants to end, for which it waits until every request has its answer.
    """

    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)
    leaving: Callable[[], bool] = lambda: False

    def settings(self) -> Mapping[str, object]:
        """The settings of a job in the body. Raises RequestError."""
        return dict(self._of("settings", dict, "an object"))

    def text(self, name: str) -> str:
        """A text of the body. Raises RequestError."""
        return str(self._of(name, str, "a text"))

    def flag(self, name: str) -> bool:
        """A truth of the body, false when left out. Raises RequestError."""
        return bool(self._of(name, bool, "true or false")) if name in self.body else False

    def whole(self, name: str) -> int:
        """A whole number of the body. Raises RequestError."""
        return int(self._of(name, int, "a whole number"))

    def asked(self, name: str, default: int) -> int:
        """A whole number of the query. Raises RequestError."""
        text = self.query.get(name, "")
        if not text:
            return default
        if len(text) > 18 or not text.lstrip("-").isdecimal():
            raise RequestError(400, f"{name} must be a whole number.")
        return int(text)

    def only(self, *names: str) -> None:
        """Refuse names in the body that nothing reads. Raises RequestError."""
        unknown = sorted(set(map(str, self.body)) - set(names))
        if unknown:
            expected = f"Known: {', '.join(names)}." if names else "None is expected."
            raise RequestError(400, f"The body has names that are not known: {', '.join(unknown)[:200]}. {expected}")

    def _of(self, name: str, kind: type, wanted: str) -> Any:
        value = self.body.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RequestError(400, f"The body must hold {name!r}: {wanted}.")
        return value


Handler = Callable[[Any, Call], object]
"""Takes the service and the call; returns plain values, or the path of a file to send."""


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this program, or from no page at all.

    `Sec-Fetch-Site` is set by the browser and cannot be forged by a page. Browsers that do not send it name the origin;
    behind a proxy the outer address stands in `X-Forwarded-Host`, which a foreign page cannot set either.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return True
    here = {headers.get("host", ""), headers.get("x-forwarded-host", "").split(",")[0].strip()} - {""}
    return urlsplit(origin).netloc.lower() in {name.lower() for name in here}


def leaves(app: Any) -> bool:
    """Whether the server that gradio runs for an application has been told to end, as WebUIs do at Reload UI."""
    return bool(getattr(getattr(getattr(app, "blocks", None), "server", None), "should_exit", False))


async def read_call(request: Request) -> Call:
    """The call of a request whose sender is known. Raises RequestError."""
    if request.method not in WRITES:
        return Call(dict(request.path_params), dict(request.query_params), leaving=lambda: leaves(request.app))
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "Send JSON, with Content-Type: application/json.")
    size = 0
    parts = []
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_FILE:
            raise RequestError(413, "The body is larger than 16 MiB.")
        parts.append(part)
    try:
        body = parse(b"".join(parts))
    except JsonError as fault:
        raise RequestError(400, f"The body {fault}.") from fault
    if not isinstance(body, dict):
        raise RequestError(400, "The body must be a JSON object.")
    return Call(dict(request.path_params), dict(request.query_params), body)


class Encoded(bytes):
    """An answer that is JSON already."""


def encoded(value: object) -> bytes:
    """A value as JSON; numbers that are not finite become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, which a file name on Linux can hold, cannot be sent.
    return text.encode("utf-8", "replace")


def answer(value: object, status: int = 200) -> Response:
    """A JSON response, or the file of a path."""
    if isinstance(value, Path):
        # Pictures and the page's own files change their address with their content; logs grow.
        grows = value.suffix.lower() in (".csv", ".json")
        return FileResponse(value, headers=HEADERS if grows else {**HEADERS, "Cache-Control": "private, max-age=3600"})
    content = bytes(value) if isinstance(value, Encoded) else encoded(value)
    return Response(content, status, dict(HEADERS), "application/json")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refusal(error: AtelierError, catalogue: Catalogue) -> Response:
    """What a user can mend, as JSON: `error` in words, `problems` with their fields."""
    found = problems(error.problems, catalogue) if isinstance(error, JobError) else []
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, (NotServedError, UnknownJobError)):
        status = 404
    else:
        status = 409 if isinstance(error, (BusyError, QueueError)) else 422
    return answer({"error": str(error), "problems": found}, status)


def endpoint(handler: Handler, service: Any, log: Callable[[], None]) -> Callable[[Request], Any]:
    """The function a router calls: checks first, then the handler, in a thread of its own unless it only waits (a
    coroutine function). `log` is told of a defect.
    """

    async def answered(request: Request) -> Response:
        try:
            if not await run_in_threadpool(service.host.authorised, request):
                if request.headers.get("authorization"):
                    await asyncio.sleep(WRONG_SECONDS)
                raise RequestError(401, "Log in first.")
            if not same_origin(request.headers):
                raise RequestError(403, "The request comes from another page.")
            call = await read_call(request)
            if inspect.iscoroutinefunction(handler):
                return answer(await handler(service, call))
            return answer(await run_in_threadpool(handler, service, call))
        except AtelierError as error:
            return refusal(error, service.catalogue)
        except ClientDisconnect:  # nobody is there to read it
            return answer({"error": "The request was interrupted.", "problems": []}, 400)
        except Exception as error:
            log()
            return answer({"error": f"{type(error).__name__} inside; see the console.", "problems": []}, 500)

    return answered
