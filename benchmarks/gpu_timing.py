"""How a call is timed on a CUDA device: events around each round, a cold L2, no wait for the host.

A round: the inputs are written anew, the L2 is overwritten, the device is put to sleep for longer
than the host needs to enqueue the call, and only then the first event. So the time between the
events is the device's alone; what the host needs is measured beside it, and bounds small calls.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

SECONDS, FEWEST, MOST = 0.15, 10, 100  # rounds are what fits into so many seconds


class Times(NamedTuple):
    """Of one call."""

    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float  # that the host was busy with one call


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, linear between neighbours.

    >>> percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    (3.5, 2.0, 5.0)
    """
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def rounds_for(seconds: float) -> int:
    """How often a call that takes so long is timed.

    >>> rounds_for(1.0), rounds_for(0.01), rounds_for(1e-6)
    (10, 15, 100)
    """
    return min(MOST, max(FEWEST, int(SECONDS / seconds)))


class Timer:
    """Times calls on the current CUDA device."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self._cycles_a_ms = _cycles_a_millisecond()

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
        rounds = rounds_for(time.perf_counter() - start)
        found = [self._round(call, prepare, host_ms) for _ in range(rounds)]
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in found]
        return Times(rounds, *percentiles(times), host_ms)

    def _round(
        self, call: Callable[[], object], prepare: Callable[[], None], host_ms: float
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        self._flush.zero_()
        torch.cuda._sleep(int(2 * host_ms * self._cycles_a_ms))
        begin.record()
        call()
        end.record()
        return begin, end


def _cycles_a_millisecond() -> float:
    """Of torch.cuda._sleep, which counts clocks; the second sleep is the one without start-up."""
    cycles = 10_000_000
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / begin.elapsed_time(end)
