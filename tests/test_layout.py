"""Whether two strided layouts share memory, against all their bytes."""

import random
from itertools import product

import pytest
import torch

from wmtp.layout import MOST_STEPS, Layout, _Search, overlap


def all_bytes(layout):
    found = set()
    for indices in product(*map(range, layout.sizes)):
        begin = layout.begin + sum(
            i * stride for i, stride in zip(indices, layout.strides, strict=True)
        )
        found |= set(range(begin, begin + layout.itemsize))
    return found


def any_layout(chance):
    """Sizes of 0 and 1, expanded, and lying across themselves too."""
    rank, itemsize = chance.randint(0, 3), chance.choice([1, 2, 4])
    sizes = chance.choices([0, 1, 1, 2, 3, 4, 5], k=rank)
    strides = chance.choices([0, 1, 2, 3, 5, 7, 12, 20], k=rank)
    return Layout(
        chance.randint(0, 40), tuple(sizes), tuple(itemsize * s for s in strides), itemsize
    )


def test_it_is_exact():
    chance, found = random.Random(0), []
    for _ in range(3000):
        a, b = any_layout(chance), any_layout(chance)
        found.append(overlap(a, b))
        assert found[-1] == bool(all_bytes(a) & all_bytes(b)), (a, b)
    assert 300 < sum(found) < 2700


Z = torch.empty(8, 4096, 4, 32000, device="meta")  # more bytes than could be looked at
PAIRS = {
    "heads": (Z[:, :, 0:1], Z[:, :, 1:2], False),
    "a head and all": (Z[:, :, 0:1], Z, True),
    "sequence first": (Z.transpose(0, 1)[:, 0:1], Z.transpose(0, 1)[:, 1:2], False),
    "columns": (Z[..., :31999], Z[..., 31999:], False),
    "interleaved columns": (Z[..., ::2], Z[..., 1::2], False),
    "interleaved tokens": (Z[:, ::2], Z[:, 1::2], False),
    "other strides": (Z[:, ::2, 0:1], Z[:, :, 1:2], False),
    "a view": (Z.flatten(0, 1).flatten(1)[:, :32000], Z[:, :, 1:2], False),
    "the same by a view": (Z.flatten(0, 1).flatten(1)[:, 32000:64000], Z[:, :, 1:2], True),
    "nothing": (Z[:, 5:5], Z, False),
    "expanded": (Z[:, :, 1:2].expand(-1, -1, 4, -1), Z[:, :, 2:3], False),
}


@pytest.mark.parametrize(("a", "b", "shared"), PAIRS.values(), ids=PAIRS)
def test_slices_take_few_steps(monkeypatch, a, b, shared):
    steps, reaches = [], _Search.reaches
    monkeypatch.setattr(
        _Search, "reaches", lambda self, *more: steps.append(1) or reaches(self, *more)
    )
    a, b = Layout.of(a), Layout.of(b)
    assert overlap(a, b) == overlap(b, a) == shared
    assert len(steps) < 40


def test_a_search_that_is_too_long_counts_as_found():
    a = Layout(0, (2000, 2000), (2000003 * 2, 2000029 * 2), 1)
    b = Layout(1, (2000, 2000), (2000039 * 2, 2000081 * 2), 1)  # odd bytes
    assert overlap(a, b)
    assert MOST_STEPS < 10_000
