"""Settings of an algorithm's own: a frozen dataclass, filled in from `--set name=value`."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wmtp.trainers.config import ConfigError
from wmtp.trainers.errors import worded


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
    for name, value in values.items():
        if name not in known:
            listed = f"known are {', '.join(known)}" if known else "the algorithm has none"
            raise ConfigError(f"no setting {name!r}: {listed}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"setting {name} must be finite, got {value}")
    if settings_type is None:
        return None
    for each in _fields(settings_type):
        if each.name not in values and _is_required(each):
            raise ConfigError(f"setting {each.name!r} is required: pass --set {each.name}=...")
    try:
        return settings_type(**values)
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ConfigError(f"{settings_type.__name__}: {worded(error)}") from error


def setting_names(settings_type: type[Any] | None) -> list[str]:
    """Of the type's fields."""
    return [] if settings_type is None else [field.name for field in _fields(settings_type)]


def _fields(settings_type: type[Any]) -> list[Field[Any]]:
    if not (isinstance(settings_type, type) and is_dataclass(settings_type)):
        name = getattr(settings_type, "__name__", repr(settings_type))
        raise ConfigError(f"the algorithm's settings_type {name} must be a dataclass")
    return [each for each in fields(settings_type) if each.init]


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def parse_settings(settings_type: type[Any] | None, given: Iterable[str]) -> dict[str, Any]:
    """What the command line says, in the types of the fields, see `TYPES`.

    Raises:
        ConfigError: no "name=value", an unknown name or one given twice, or a value of another
            type.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Focal:
        ...     focus: float = 2.0
        >>> parse_settings(Focal, ["focus=3"])
        {'focus': 3.0}
    """
    values: dict[str, Any] = {}
    texts = list(given)
    known = setting_names(settings_type)
    hints = _hints(settings_type) if settings_type is not None and known and texts else {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set wants name=value, got {text!r}")
        if name in values:
            raise ConfigError(f"--set {name} is given twice: pass it once")
        values[name] = _converted(name, value, hints.get(name, str))
    check_settings(settings_type, values)
    return values


def _hints(settings_type: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(settings_type)
    except Exception as error:  # it evaluates the user's annotations
        said = worded(error)
        raise ConfigError(f"{settings_type}: its types cannot be read ({said})") from error


def _converted(name: str, text: str, wanted: Any) -> Any:
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    kind = wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
    for option in options:
        if option not in _READERS and get_origin(option) is not Literal:
            raise ConfigError(f"--set {name}: no {kind} can be set, only {TYPES}")
    for option in sorted(options, key=lambda option: option is str):  # which takes anything
        with contextlib.suppress(ValueError):
            return _read(text, option)
    raise ConfigError(f"--set {name} must be of type {kind}, got {text!r}")


def _read(text: str, wanted: Any) -> Any:
    if wanted in _READERS:
        return _READERS[wanted](text)
    return _one_of(text, {str(choice): choice for choice in get_args(wanted)})


def _one_of(text: str, choices: dict[str, Any]) -> Any:
    if text not in choices:
        raise ValueError
    return choices[text]


TYPES = "bool, int, float, str, Literal, and Optional of these"
_READERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: _one_of(text.lower(), {"true": True, "false": False}),
    int: int,
    float: float,
    str: str,
    NoneType: lambda text: _one_of(text.lower(), {"none": None}),
}
