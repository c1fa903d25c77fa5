"""A scorer's settings, from `config={...}` or by name."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

S = TypeVar("S")


def with_config(settings: S, config: Mapping[str, Any] | None) -> S:
    """The settings (a dataclass), with those of `config` in their place.

    Raises:
        ValueError: a name that is none of them; lists those there are.
    """
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(config or {}) - set(known))
    if unknown:
        raise ValueError(f"config has no setting {unknown[0]!r}: known are {', '.join(known)}")
    return replace(settings, **(config or {}))  # type: ignore[type-var]
