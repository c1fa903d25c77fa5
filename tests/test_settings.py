"""Settings of an algorithm's own, from Python and from the command line."""

from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest

from wmtp.trainers import ConfigError
from wmtp.trainers.settings import check_settings, parse_settings, setting_names


@dataclass(frozen=True)
class Kinds:
    flag: bool = False
    limit: Optional[float] = None  # noqa: UP045  (as users write it)
    count: int | None = 3
    word: str | None = None
    mode: Literal["soft", "hard", 2] = "soft"
    names: list = field(default_factory=list)
    made: int = field(default=0, init=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("flag=True", True),
        ("limit=2", 2.0),
        ("limit=none", None),
        ("count=none", None),
        ("count=4", 4),
        ("word=none", None),
        ("word=a=b", "a=b"),
        ("mode=hard", "hard"),
        ("mode=2", 2),
    ],
)
def test_types_that_can_be_set(text, value):
    (found,) = parse_settings(Kinds, [text]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flag=2", "--set flag must be of type bool, got '2'"),
        ("limit=much", r"--set limit must be of type Optional\[float\]|float \| None, got 'much'"),
        ("limit=inf", "setting limit must be finite, got inf"),
        ("mode=loud", r"--set mode must be of type Literal\['soft', 'hard', 2\], got 'loud'"),
        ("names=a", "--set names: no list can be set, only bool, int, float, str, Literal, and"),
        ("made=1", "no setting 'made': known are flag, limit, count, word, mode, names"),
    ],
)
def test_values_that_cannot_be(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(Kinds, [text])


def test_a_name_given_twice():
    with pytest.raises(ConfigError, match="--set count is given twice: pass it once"):
        parse_settings(Kinds, ["count=1", "count=2"])


@dataclass(frozen=True)
class Required:
    focus: float

    def __post_init__(self):
        if self.focus < 0:
            raise RuntimeError(f"focus is {self.focus}")
        if self.focus > 9:
            raise SystemExit


def test_a_setting_that_is_required():
    with pytest.raises(ConfigError, match=r"setting 'focus' is required: pass --set focus=\.\.\."):
        check_settings(Required, {})
    assert check_settings(Required, {"focus": 1.0}).focus == 1


@pytest.mark.parametrize(("focus", "said"), [(-1.0, "RuntimeError: focus is -1.0"), (10.0, "Sys")])
def test_an_error_in_the_settings_own_check(focus, said):
    with pytest.raises(ConfigError, match=f"Required: {said}"):
        check_settings(Required, {"focus": focus})


@pytest.mark.parametrize("kind", [dict, 3, Required(1.0)])
def test_settings_that_are_no_dataclass(kind):
    with pytest.raises(ConfigError, match=r"settings_type .* must be a dataclass"):
        setting_names(kind)
    with pytest.raises(ConfigError, match="must be a dataclass"):
        parse_settings(kind, ["a=1"])


@dataclass
class Unresolved:
    focus: "Nowhere" = 1  # type: ignore[name-defined]  # noqa: F821


def test_a_type_that_is_nowhere():
    with pytest.raises(ConfigError, match="its types cannot be read"):
        parse_settings(Unresolved, ["focus=1"])
