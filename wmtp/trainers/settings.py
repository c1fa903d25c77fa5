"""Settings of an algorithm's own: a frozen dataclass, filled in from `--set name=value`."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from wmtp.trainers.config import ConfigError


def check_settings(settings_type: type[Any] | None, values: Mapping[str, Any]) -> Any:
    """An instance of the type with these values; None where an algorithm has no settings.

    Raises:
        ConfigError: a name that the type has not, or a value that it refuses.

        >>> check_settings(None, {"focus": 2.0})
        Traceback (most recent call last):
            ...
        wmtp.trainers.config.ConfigError: no setting 'focus': the algorithm has none
    """
    known = setting_names(settings_type)
    for name in values:
        if name not in known:
            listed = f"known are {', '.join(known)}" if known else "the algorithm has none"
            raise ConfigError(f"no setting {name!r}: {listed}")
    if settings_type is None:
        return None
    try:
        return settings_type(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{settings_type.__name__}: {error}") from error


def setting_names(settings_type: type[Any] | None) -> list[str]:
    """Of the type's fields."""
    return [] if settings_type is None else [field.name for field in fields(settings_type)]


def parse_settings(settings_type: type[Any] | None, given: Iterable[str]) -> dict[str, Any]:
    """What the command line says, in the types of the fields: bool, int, float or str.

    Raises:
        ConfigError: no "name=value", an unknown name, or a value of another type.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Focal:
        ...     focus: float = 2.0
        >>> parse_settings(Focal, ["focus=3"])
        {'focus': 3.0}
    """
    values: dict[str, Any] = {}
    hints = {} if settings_type is None else get_type_hints(settings_type)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set wants name=value, got {text!r}")
        values[name] = _converted(name, value, hints.get(name, str))
    check_settings(settings_type, values)
    return values


def _converted(name: str, text: str, wanted: Any) -> Any:
    if wanted is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if wanted is str:
        return text
    try:
        if wanted in (int, float):
            return wanted(text)
    except ValueError:
        pass
    kind = getattr(wanted, "__name__", str(wanted))
    raise ConfigError(f"--set {name} must be of type {kind}, got {text!r}")
