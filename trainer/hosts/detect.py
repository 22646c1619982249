"""Which WebUI this process is."""

from __future__ import annotations

import importlib.util

from .a1111 import A1111
from .forge import Forge, Neo, ReForge
from .webui import WebUI


def webui() -> WebUI:
    """The host for the WebUI whose `modules` package is importable here."""
    if not _there("modules_forge"):
        return A1111()
    if not _there("backend"):
        return ReForge()
    return Forge() if _there("modules.lowvram") else Neo()


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
