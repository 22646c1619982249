"""Whether a request was let in by the WebUI's own login: gradio's cookie, or a name and password of the API."""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Iterable
from typing import Any


def gradio_lets_in(request: Any, api_users: Iterable[str] = ()) -> bool:
    """Whether gradio's login of the app that got the request has let its sender in, or no login is set.

    `api_users`: further `name:password` pairs that may come as HTTP basic authentication. Works for gradio 3.41 to 5:
    the cookie's name got the app's id in between.
    """
    app = request.app
    users, custom = getattr(app, "auth", None), getattr(app, "auth_dependency", None)
    if custom is not None:
        return custom(request) is not None
    if users is None:
        return True
    names = ["access-token", "access-token-unsecure"]
    if getattr(app, "cookie_id", None):
        names = [f"{name}-{app.cookie_id}" for name in names]
    tokens = getattr(app, "tokens", {})
    if any(tokens.get(request.cookies.get(name)) is not None for name in names if request.cookies.get(name)):
        return True
    given = basic_credentials(request.headers.get("authorization", ""))
    known = [f"{name}:{word}" for name, word in users.items()] if isinstance(users, dict) else []
    return given is not None and any(_same(given, pair) for pair in [*known, *api_users])


def basic_credentials(header: str) -> str | None:
    """`name:password` of an Authorization header; None when it has none."""
    kind, _, coded = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        return base64.b64decode(coded.strip(), validate=True).decode("utf-8")
    except ValueError:  # no base64 (letters beyond ASCII too), or no UTF-8 in it
        return None


def right_login(header: str, login: str) -> bool:
    """Whether an Authorization header brings this `name:password`."""
    given = basic_credentials(header)
    return given is not None and _same(given, login)


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens on this name or address."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address.lower() == "localhost"
