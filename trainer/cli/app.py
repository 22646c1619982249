"""The standalone app: the tab as a page of its own, on this machine alone unless asked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import AtelierError
from ..hosts.guard import LOCAL_NAMES, Guard, Sending
from ..places import Places
from ..ui.service import Service
from ..writing import why

FIRST_PORT, PORTS = 7860, 100
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
PATIENCE = 30.0
"""Seconds that the running job has to write its state when the app is ended."""


@dataclass(frozen=True)
class AppOptions:
    """How the app is started. `port` 0 takes the first free one from 7860 on; `login` is `name:password` or ""."""

    places: Places
    port: int = 0
    listen: bool = False
    data_root: Path | None = None
    login: str = ""
    names: tuple[str, ...] = ()


def bind(address: str, port: int) -> socket.socket:
    """A socket that listens, on `port` or for 0 on the first free one from 7860 on. Raises AtelierError when it is in
    use.
    """
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Windows' SO_REUSEADDR would share a port that another program listens on.
        option = socket.SO_EXCLUSIVEADDRUSE if os.name == "nt" else socket.SO_REUSEADDR  # type: ignore[attr-defined,unused-ignore]
        found.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            found.bind((address, candidate))
            found.listen(128)
            return found
        except OSError as fault:
            found.close()
            if port or fault.errno not in (errno.EADDRINUSE, errno.EACCES):
                message = f"Port {candidate} cannot be used: {why(fault)}. Choose another with --port."
                raise AtelierError(message) from fault
    raise AtelierError(f"The ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are in use. Choose one with --port.")


def make_app(options: AppOptions, service: Service) -> Any:
    """The whole application: routes, page, and the door in front of both."""
    from fastapi import FastAPI

    from ..ui.api import add_routes
    from ..ui.http import same_origin
    from ..ui.tab import mount
    from ..ui.views import PREFIX

    app = FastAPI(title="Atelier", docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, service)
    page = mount(app, service.catalogue)
    names = None if options.listen else {*LOCAL_NAMES, *options.names}
    return Guard(page, names, options.login, Sending(same_origin, writable=f"{PREFIX}/"))


def serve(options: AppOptions) -> int:
    """Run the app until it is ended; returns the exit status."""
    # Gradio asks the network for its newest version and reports its use, unless it is told not to.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from ..hosts.standalone import Standalone
    from .service import make_service

    if options.login and ":" not in options.login:
        raise AtelierError("--auth takes NAME:PASSWORD.")
    address = EVERYWHERE if options.listen else LOOPBACK
    with bind(address, options.port) as listening:
        host = Standalone(options.places, address=address, data_root=options.data_root, login=options.login)
        service = make_service(host)
        try:
            _run(make_app(options, service), service, listening, options)
        finally:
            service.queue.close(PATIENCE)
    return 0


def _run(app: Any, service: Service, listening: socket.socket, options: AppOptions) -> None:
    from .server import Server, config

    def ready() -> None:
        print(greeting(listening.getsockname()[1], options), flush=True)

    async def ending() -> None:
        if service.queue.running() is not None:
            print("Ending the running job after this step; it can be resumed.", file=sys.stderr, flush=True)
        await asyncio.to_thread(service.queue.close, PATIENCE)

    server = Server(config(app), ready, ending)
    _end_on_hangup(server)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has ended everything
        server.run(sockets=[listening])


def _end_on_hangup(server: Any) -> None:
    """The end of the terminal ends the app as Ctrl+C does, with the state of the running job written."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    main = threading.current_thread() is threading.main_thread()
    if hangup is None or not main or signal.getsignal(hangup) == signal.SIG_IGN:  # nohup wants it ignored
        return

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    signal.signal(hangup, end)


def greeting(port: int, options: AppOptions) -> str:
    """What is printed when the app listens."""
    lines = [f"Atelier runs at http://127.0.0.1:{port} (end it with Ctrl+C)"]
    if options.listen:
        lines.append(f"It listens on every interface of this machine, port {port}.")
        if not options.login:
            lines.append("Whoever can reach it can use it: --auth NAME:PASSWORD sets a password.")
        if options.data_root is None:
            lines.append("Only the demo's images may be trained on: --data-root FOLDER names a folder for others.")
    return "\n".join(lines)
