"""How often a call is timed, and how on a CUDA device: a cold L2, no wait for the host.

A round on the device: the inputs are written anew, the L2 is overwritten, the device is put to
sleep for longer than the host needs to enqueue the call, and only then the first event. So the time
between the events is the device's alone; what the host needs is measured beside it, and bounds
small calls. On the CPU pytest-benchmark has the clock (bench.py).
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Of one call."""

    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float  # that the host was busy with one call


class Rounds(NamedTuple):
    """As many as fit into so many seconds, at least and at most so many.

    >>> [Rounds(0.15, 10, 100).of(seconds) for seconds in (1.0, 0.01, 1e-6)]
    [10, 15, 100]
    """

    seconds: float
    fewest: int
    most: int

    def of(self, seconds: float) -> int:
        """Of a call that takes so long."""
        return min(self.most, max(self.fewest, int(self.seconds / seconds)))


ON_DEVICE = Rounds(0.15, 10, 100)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, linear between neighbours.

    >>> percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    (3.5, 2.0, 5.0)
    """
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


class Timer:
    """Times calls on the current CUDA device."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        cycles = 10_000_000
        for _ in range(2):  # the second sleep is the one without start-up
            sleep = _between_events(lambda: torch.cuda._sleep(cycles))
        self._cycles_a_ms = cycles / sleep()

    def time(self, call: Callable[[], object], prepare: Callable[[], None]) -> Times:
        """Args: call, whose work lies on the current stream; prepare, what precedes it untimed."""
        prepare()
        call()  # what is compiled or allocated once
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        enqueued = time.perf_counter()
        torch.cuda.synchronize()
        host_ms = 1e3 * (enqueued - start)

        def one_round() -> Callable[[], float]:
            prepare()
            self._flush.zero_()
            torch.cuda._sleep(int(2 * host_ms * self._cycles_a_ms))
            return _between_events(call)

        rounds = ON_DEVICE.of(time.perf_counter() - start)
        times = [taken() for taken in [one_round() for _ in range(rounds)]]
        return Times(rounds, *percentiles(times), host_ms)


def _between_events(call: Callable[[], object]) -> Callable[[], float]:
    """Enqueue it; what is returned waits for its milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def milliseconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return milliseconds
