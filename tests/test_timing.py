"""How often a call is timed, and what is made of the times."""

import pytest

from wmtp.benchmarks.timing import ON_DEVICE, percentiles


def test_percentiles_by_hand():
    # Six values: the 20th percentile is the second smallest, the 80th the second largest.
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    median, low, high = percentiles([float(i) for i in range(101)])
    assert (median, low, high) == pytest.approx((50, 20, 80))


def test_rounds_are_at_least_ten():
    assert [ON_DEVICE.of(seconds) for seconds in (1.0, 0.01, 1e-6)] == [10, 15, 100]
