"""Covering arrays of strength two: far fewer rows than the product of the axes, in which any two
values of different axes still meet. What fails for one value, or for two together, still fails."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest

# Fixtures with values of their own, which a row may choose too.
FIXTURES = ("instruction_set", "tier")

Row = tuple[int, ...]  # of each axis the number of a value


def pairwise(
    *axes: Iterable[Any], where: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """Of the rows for which `where(*row)` holds some, the same each time: two values that are
    together in any of them are in one that is chosen.

    >>> pairwise("ab", [1, 2], [True, False])
    [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    values = [list(axis) for axis in axes]

    def of(row: Row) -> tuple[Any, ...]:
        return tuple(axis[number] for axis, number in zip(values, row, strict=True))

    rows = [row for row in product(*(range(len(axis)) for axis in values)) if where(*of(row))]
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:  # the first of the rows with most of the missing pairs
        best = max(rows, key=lambda row: len(missing.intersection(_pairs(row))))
        missing.difference_update(_pairs(best))
        chosen.append(of(best))
    return chosen


def _pairs(row: Row) -> list[tuple[tuple[int, int], ...]]:
    """One axis alone has no pairs: its values stand for them."""
    return list(combinations(enumerate(row), min(2, len(row))))


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
