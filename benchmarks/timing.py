"""How a case is compared and counted, and how a call is timed on a CUDA device: with a cold L2, and
without waiting for the host. On the CPU pytest-benchmark has the clock (bench.py).

A round on the device: the inputs are written anew, the L2 is overwritten, the device is put to
sleep for longer than the host needs to enqueue the call, and only then the first event. So the time
between the events is the device's alone; what the host needs is measured beside it, and bounds
small calls.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import wmtp
from wmtp.benchmarks.memory import TINY, peak_bytes
from wmtp.benchmarks.problem import Case, Problem, Shape


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


class First(NamedTuple):
    """What a case's first calls tell."""

    peak_bytes: int
    seconds: float  # about, of one call
    found: tuple[Tensor, ...]


class Bench:
    """The first calls of one case after the other; a problem is kept while it stays the same.

    Args:
        most_rows: outputs are compared at so many rows where the case has more.
    """

    def __init__(self, device: str, most_rows: int | None = None):
        self.device, self._most_rows = device, most_rows
        self._problem: Problem | None = None

    def problem_of(self, case: Case, shape: Shape | None = None) -> Problem:
        """The case's inputs, or such of another shape."""
        kept, key = self._problem, (shape or case.shape, case.torch_dtype, case.dim)
        if kept is None or (kept.shape, kept.dtype, kept.dim) != key:
            self.forget()  # before there are two
            torch._dynamo.reset()  # each shape is compiled for itself, within the limit of these
            kept = self._problem = Problem(*key[:2], self.device, case.dim)
        return kept

    def first_calls(self, case: Case) -> First:
        """Call, compare with eager torch in float32, and count peak bytes.

        Raises:
            AssertionError: they disagree.
        """
        how = case.provider, case.direction, case.weighting
        shape, on_gpu = self._fewer_rows(case.shape), self.device == "cuda"
        if shape != case.shape:
            self.problem_of(case, shape).check(*how)
        problem = self.problem_of(case)
        call = problem.call(*how)
        one = problem.contestants.get(case.provider)
        problem.restore()
        if on_gpu or (one is not None and one.compiles):
            call()  # what is compiled for the shape
        else:  # what is allocated once, whatever the shape
            Problem(TINY, case.torch_dtype, self.device, case.dim).call(*how)()
        problem.restore()
        found: list[tuple[Tensor, ...]] = []
        start = time.perf_counter()
        peak = peak_bytes(lambda: found.append(call()), self.device)
        seconds = time.perf_counter() - start
        if shape == case.shape:
            problem.compare(case.provider, found[0], case.weighting)
        if on_gpu:
            problem.forget_truth()
        return First(0 if case.provider == "copy" else peak, seconds, found[0])

    def forget(self) -> None:
        self._problem = None
        if self.device == "cuda":
            wmtp.release_memory()
            torch.cuda.empty_cache()

    def _fewer_rows(self, shape: Shape) -> Shape:
        batch, length, heads, vocabulary = shape
        most = length if self._most_rows is None else self._most_rows // heads
        return batch, min(length, most), heads, vocabulary


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
