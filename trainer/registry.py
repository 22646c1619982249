"""Names → things: a decorator that registers, a scan of our own packages, a lookup that suggests.

Nothing is ever imported from a name found in a file: presets are strangers' input.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import AtelierError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of things of one kind. `package` is the package, relative to the trainer, whose modules fill it."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._things: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._scanned = False

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator: enter the decorated thing under `name`. Raises ValueError when the name is taken by another
        thing, TypeError for a class that leaves abstract methods open.
        """

        def enter(thing: T) -> T:
            missing = ", ".join(sorted(getattr(thing, "__abstractmethods__", ())))
            if missing:  # most of them are asked of the class itself, where Python would not notice
                what = getattr(thing, "__qualname__", thing)
                raise TypeError(f"{self.kind} {name!r}: {what} must define {missing} before it can be registered")
            if name in self._things:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._things[name] = thing
            self._aliases.update({alias.lower(): name for alias in (name, *aliases)})
            return thing

        return enter

    def scan(self) -> None:
        """Import every module of the package once, so that its decorators run."""
        if self._scanned:
            return
        self._scanned = True
        root = __name__.rpartition(".")[0]
        package = importlib.import_module(f"{root}.{self._package}")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
            importlib.import_module(f"{package.__name__}.{module.name}")

    def names(self) -> tuple[str, ...]:
        """All registered names: by file, and within a file in order of registration, whatever was imported first."""
        return tuple(name for name, _ in self.items())

    def items(self) -> Iterator[tuple[str, T]]:
        """Pairs of name and thing, in that order."""
        self.scan()
        return iter(sorted(self._things.items(), key=lambda entry: str(getattr(entry[1], "__module__", ""))))

    def aliases(self) -> dict[str, str]:
        """Every accepted spelling in lower case → the registered name."""
        self.scan()
        return dict(self._aliases)

    def canonical(self, name: str) -> str:
        """The registered spelling of `name`, ignoring case and resolving aliases. Raises AtelierError with a
        suggestion.
        """
        self.scan()
        found = self._aliases.get(name.lower())
        if found is None:
            near = difflib.get_close_matches(name.lower(), list(self._aliases), n=1)
            hint = f" Did you mean {self._aliases[near[0]]!r}?" if near else ""
            raise AtelierError(f"{self.kind} {name!r} is not known.{hint} Known: {', '.join(self._things)}.")
        return found

    def get(self, name: str) -> T:
        """The thing registered under `name` (or an alias, in any case). Raises AtelierError with a suggestion."""
        return self._things[self.canonical(name)]
