"""The covering arrays that the suite's parameters are drawn from."""

from itertools import combinations, product

import pytest

from support.covering import in_pairs, pairwise

SIZES = [(2, 2, 2), (4, 4, 6, 5), (10, 4, 4), (3, 1, 2), (2, 3, 3, 2, 2, 5), (7, 7), (4, 3, 2, 6)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_two_values_meet_in_few_rows(sizes):
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = pairwise(*axes)
    for i, j in combinations(range(len(axes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(axes[i], axes[j]))
    assert len(set(rows)) == len(rows)
    fewest = max(a * b for a, b in combinations(sizes, 2))
    assert fewest <= len(rows) <= 1.5 * fewest + 1
    assert rows == pairwise(*axes)


def test_what_goes_together():
    def where(a, b, c):
        return not (a == b == 0) and (c or a != 3)

    everything = [row for row in product(range(4), range(3), [False, True]) if where(*row)]
    rows = pairwise(range(4), range(3), [False, True], where=where)
    assert set(rows) < set(everything)
    for i, j in combinations(range(3), 2):
        assert {(row[i], row[j]) for row in rows} == {(row[i], row[j]) for row in everything}


def test_one_axis_and_an_empty_one():
    assert pairwise("abc") == [("a",), ("b",), ("c",)]
    assert pairwise("abc", []) == []


def test_values_need_neither_hash_nor_order():
    assert pairwise([{}, []], [1.0, float("nan")])[0] == ({}, 1.0)
    assert len(pairwise([None, None], "ab")) == 4  # two of a kind are two values


def test_as_parameters():
    mark = in_pairs(tier=["row", "online"], call=[len, (max, 1)], shared=[True, False]).mark
    names, rows = mark.args
    assert names == ["tier", "call", "shared"]
    assert [mark.kwargs["ids"](value) for value in (len, (max, 1), None)] == [
        "len",
        "max, 1",
        "None",
    ]
    assert len(rows) == 4
    assert mark.kwargs["indirect"] == ["tier"]  # which the fixture sets up
