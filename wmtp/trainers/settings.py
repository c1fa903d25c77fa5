"""Settings of an algorithm's own: a frozen dataclass, filled in from `--set name=value`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    if settings_type is not None and not is_dataclass(settings_type):
        raise ConfigError(
            f"settings_type must be a frozen dataclass, got {settings_type.__name__}: decorate it "
            "with @dataclass(frozen=True)"
        )
    known = setting_names(settings_type)
    for name in values:
        if name not in known:
            listed = f"known are {', '.join(known)}" if known else "the algorithm has none"
            raise ConfigError(f"no setting {name!r}: {listed}")
    if settings_type is None:
        return None
    for each in fields(settings_type):
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        if each.init and not has_default and each.name not in values:
            raise ConfigError(f"the algorithm needs a {each.name}: pass --set {each.name}=VALUE")
    try:
        return settings_type(**values)
    except Exception as error:
        line = f"{error}".split("\n")[0]
        raise ConfigError(f"{settings_type.__name__} refuses its values: {line}") from error


def setting_names(settings_type: type[Any] | None) -> list[str]:
    """Of the type's fields."""
    return [] if not is_dataclass(settings_type) else [each.name for each in fields(settings_type)]


def parse_settings(settings_type: type[Any] | None, given: Iterable[str]) -> dict[str, Any]:
    """What the command line says, in the types of the fields: bool, int, float, str, Literal of
    them, or one of these or None.

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
        if name in values:
            raise ConfigError(f"--set {name} is given twice: leave one out")
        values[name] = _converted(name, value, hints.get(name, str))
    check_settings(settings_type, values)
    return values


def _converted(name: str, text: str, wanted: Any) -> Any:
    if get_origin(wanted) in (Union, UnionType):
        kinds = [kind for kind in get_args(wanted) if kind is not NoneType]
        if len(kinds) < len(get_args(wanted)) and text.lower() == "none":
            return None
        if len(kinds) == 1:
            return _converted(name, text, kinds[0])
    if get_origin(wanted) is Literal:
        for choice in get_args(wanted):
            if text == str(choice):
                return choice
        listed = ", ".join(map(str, get_args(wanted)))
        raise ConfigError(f"--set {name} must be one of {listed}, got {text!r}")
    if wanted not in (bool, int, float, str):
        raise ConfigError(
            f"--set {name}: a field of type {wanted} cannot be set there: give it the type bool, "
            "int, float, str, Literal, or one of these | None"
        )
    if wanted is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if wanted is str:
        return text
    try:
        if wanted in (int, float) and math.isfinite(number := wanted(text)):
            return number
    except ValueError:
        pass
    kind = "a finite float" if wanted is float else f"of type {wanted.__name__}"
    raise ConfigError(f"--set {name} must be {kind}, got {text!r}")
