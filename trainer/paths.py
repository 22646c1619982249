"""Paths as people, files and requests give them: too long, with an unknown `~name`, with bytes no path may hold.

The standard library raises for some of these and answers for others, differently from version to version. Here they
are paths of files that are not there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .writing import why


def expanded(text: str | os.PathLike[str]) -> Path:
    """The path of a text, `~` read as the home folder; a `~name` nobody has stays as it is."""
    path = Path(text)
    with contextlib.suppress(RuntimeError, ValueError, OSError):
        return path.expanduser()
    return path


def is_file(path: Path) -> bool:
    """Whether there is a file; False for what cannot be a path, and for what may not be looked at."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_dir(path: Path) -> bool:
    """Whether there is a folder; False for what cannot be a path, and for what may not be looked at."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def exists(path: Path) -> bool:
    """Whether there is a file or folder; False for what cannot be a path, and for what may not be looked at."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def why_absent(path: Path) -> str:
    """Why there is nothing usable at a path, as the end of a sentence that begins with it; "" when there is."""
    try:
        path.stat()
    except FileNotFoundError:
        return "does not exist"
    except NotADirectoryError:
        return "does not exist: something above it is a file"
    except OSError as fault:
        return f"cannot be used: {why(fault)}"
    except ValueError:
        return "is not a path: it holds a character that no path may hold"
    return ""
