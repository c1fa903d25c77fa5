"""Covering arrays of strength two: far fewer rows than the product of the axes, in which any two
values of different axes still meet. What fails for one value, or for two together, still fails."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

# Fixtures with values of their own, which a row may choose too.
FIXTURES = ("instruction_set", "tier", "forced")

Row = tuple[Hashable, ...]  # of each axis a value, or its number


def pairwise(
    *axes: Iterable[Any], where: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """Of the rows for which `where(*row)` holds some, the same each time: two values that are
    together in any of them are in one that is chosen.

    >>> pairwise("ab", [1, 2], [True, False])
    [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    values = [list(axis) for axis in axes]

    def of(row: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(axis[number] for axis, number in zip(values, row, strict=True))

    rows = [row for row in product(*(range(len(axis)) for axis in values)) if where(*of(row))]
    return [of(rows[number]) for number in covering(rows)]


def covering(rows: Sequence[Row]) -> list[int]:
    """The numbers of some of the rows, in which all pairs of values are that are in any."""
    pairs = [set(_pairs(row)) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:  # the first of the rows with most of the missing pairs
        best = max(range(len(rows)), key=lambda number: len(missing & pairs[number]))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def _pairs(row: Row) -> Iterable[Any]:
    """One axis alone has no pairs: its values stand for them."""
    return combinations(enumerate(row), min(2, len(row)))


def in_pairs(
    where: Callable[..., bool] = lambda *_: True, **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """Instead of one `pytest.mark.parametrize` for each axis: the rows of `pairwise`."""
    names = list(axes)
    return pytest.mark.parametrize(
        names,
        pairwise(*axes.values(), where=where),
        indirect=[name for name in names if name in FIXTURES],
        ids=_name,
    )


def _name(value: Any) -> str:
    """The same in every process, which the text of a function is not."""
    if isinstance(value, tuple):
        return ", ".join(map(_name, value))
    return getattr(value, "__name__", None) or str(value)
