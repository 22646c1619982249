"""LyCORIS's functional part, imported when a type needs it. Its modules, merges and reloads are not used."""
from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from ..errors import MissingPackageError

EAGER = "torch"
"""The backend asked for in every call: on a GPU the default would compile kernels inside the WebUI's process."""


@cache
def functional(name: str) -> Any:
    """The module `lycoris.functional.<name>`; None with a torch older than LyCORIS can use, where a type's own product
    stands in. Raises MissingPackageError.
    """
    try:
        return importlib.import_module(f"lycoris.functional.{name}")
    except ImportError as error:
        raise MissingPackageError("network_type", "lycoris-lora", str(error)) from error
    except AttributeError:  # LyCORIS 4.1 asks torch for what came with 2.4; A1111 pins 2.1 and Forge 2.3
        return None
