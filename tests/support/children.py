"""What programs that tests start need: an environment and a port."""

from __future__ import annotations

import os
import socket
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = (TESTS.parent, TESTS, TESTS / "support")
"""Where the trainer and the helpers of the tests are imported from, as in pyproject.toml."""


def environment() -> dict[str, str]:
    """The environment of a child process that imports the trainer and the helpers of the tests, one thread each."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
