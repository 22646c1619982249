"""What programs that tests start need: an environment and a port."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def environment() -> dict[str, str]:
    """The environment of a child process that imports the trainer and the helpers of the tests, one thread each."""
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(here.parent), str(here))), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
