"""Algorithms and scorers by name ("rho1-wmtp"), as configurations and the command line say them."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

C = TypeVar("C")


class Registration(NamedTuple):
    """One registered class: `category` groups entries, `version` is that of the algorithm."""

    name: str
    category: str
    version: str
    cls: type[Any]


class Registry:
    """Classes under names.

    Args:
        kind: what is registered here, for the error messages.
        home: the package whose import enters the library's own classes; imported at first look-up.

        >>> registry = Registry("colour")
        >>> @registry.register("red", category="warm", version="1.0.0")
        ... class Red: ...
        >>> registry.get("red") is Red
        True
        >>> registry.get("blue")
        Traceback (most recent call last):
            ...
        KeyError: "no colour is registered as 'blue': known are 'red'"
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind = kind
        self._home = home
        self._entries: dict[str, Registration] = {}

    def register(self, name: str, *, category: str, version: str) -> Callable[[type[C]], type[C]]:
        """A class decorator that enters the class under `name`.

        Raises:
            ValueError: `name` is taken.
        """

        def enter(cls: type[C]) -> type[C]:
            if name in self._entries:
                taken = self._entries[name].cls.__qualname__
                raise ValueError(
                    f"{self.kind} {name!r} is already registered (by {taken}): "
                    f"choose another name for {cls.__qualname__}"
                )
            self._entries[name] = Registration(name, category, version, cls)
            return cls

        return enter

    def entry(self, name: str) -> Registration:
        """The whole registration of `name`.

        Raises:
            KeyError: nothing has that name; lists the names there are.
        """
        known_names = self.names()
        if name not in self._entries:
            known = ", ".join(map(repr, known_names)) or "none"
            raise KeyError(f"no {self.kind} is registered as {name!r}: known are {known}")
        return self._entries[name]

    def get(self, name: str) -> type[Any]:
        """The class registered as `name`; raises as `entry` does."""
        return self.entry(name).cls

    def names(self, category: str | None = None) -> list[str]:
        """All names, or those of one category, in the order of registration."""
        if self._home is not None:
            importlib.import_module(self._home)
        return [
            entry.name
            for entry in self._entries.values()
            if category is None or entry.category == category
        ]


trainer_registry = Registry("trainer", home="wmtp.trainers")
scorer_registry = Registry("scorer", home="wmtp.scorers")
