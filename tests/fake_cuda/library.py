"""Compiles and loads the small library beside this file. Import it before torch.

`missing()` says why that cannot be done here, "" when it can. The compiled library is kept in a cache folder, by a hash
of its source and of torch's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("card.cpp")
WANTED = "2.13"
"""The torch whose headers the source is written for, as launch.py installs it with the newest packages."""


def missing() -> str:
    """Why there can be no fake card with this Python, "" when there can."""
    version = importlib.metadata.version("torch")
    if not version.startswith(WANTED + "."):
        return f"the fake card is written for torch {WANTED}, this is {version}"
    if not sys.platform.startswith("linux"):
        return "the fake card was only tried on Linux"
    if shutil.which("g++") is None:
        return "the fake card needs g++, which is not installed"
    if not (_torch() / "include" / "ATen").is_dir():
        return f"the fake card needs torch's headers, which are not in {_torch()}"
    return ""


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("torch is not installed")
    return Path(found.submodule_search_locations[0])


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "atelier-fake-cuda"


def compiled() -> Path:
    """The compiled library; made when it is not there yet, which takes about half a minute. Raises RuntimeError with
    the compiler's words.
    """
    version = importlib.metadata.version("torch")
    name = hashlib.sha256(f"{version} {sys.version_info[:2]}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    import fcntl  # which Windows has not

    folder = _cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"atelier-fake-cuda-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"card-{name}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several that start at once, one compiles
        if not target.exists():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    root, beside = _torch(), target.with_suffix(f".{os.getpid()}.tmp")
    include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", *include, str(SOURCE), "-o", str(beside)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    os.replace(beside, target)


def load() -> None:
    """Register the fake card. Raises RuntimeError when torch is imported already: its devices are settled by then."""
    if "torch" in sys.modules:
        raise RuntimeError("load the fake card before torch is imported")
    folder = _torch() / "lib"
    for path in [*sorted(folder.glob("libgomp*")), folder / "libc10.so", folder / "libtorch_cpu.so"]:
        if path.exists():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(compiled()), mode=ctypes.RTLD_GLOBAL)
