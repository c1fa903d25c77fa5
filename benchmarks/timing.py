"""How one case is compared, measured and timed; what bench_loss.py and bench_scaling.py share.

The environment variable WMTP_BENCH_SIZE chooses how much there is to do: "full", "quick" (few and
short cases, nothing that compiles) or "tiny" (the suite's own tests).
"""

import functools
import os
import time
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from wmtp.benchmarks.linear_problem import LinearProblem, new_problem
from wmtp.benchmarks.memory import peak_bytes
from wmtp.benchmarks.problem import THREADS, Case, Problem, Shape
from wmtp.benchmarks.providers import COMPILED, absent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "bfloat16")
SIZE = os.environ.get("WMTP_BENCH_SIZE", "full")
# Rounds are what fits into so many seconds, at least and at most so many.
SECONDS, FEWEST = {"full": (0.5, 5), "quick": (0.3, 5), "tiny": (0.0, 2)}[SIZE]
MOST = 1000
TINY = (1, 2, 1, 2)


def suite(
    cases: list[Case], absent: Callable[[bool], Iterable[str]] = absent
) -> pytest.MarkDecorator:
    """The test function's `case`: those that can run here."""
    left_out = absent(SIZE == "full")
    return pytest.mark.parametrize(
        "case", [case for case in cases if case.provider not in left_out], ids=str
    )


def shrunk(shape: Shape) -> Shape:
    """The shape itself; a few elements when the size is "tiny"."""
    if SIZE != "tiny":
        return shape
    batch, length, heads, vocabulary = shape
    return min(batch, 2), min(length, 8), min(heads, 4), max(2, vocabulary // 100)


def time_case(benchmark, case: Case, fewest: int = FEWEST) -> None:
    """Compare with the truth, count peak bytes, then time."""
    torch.set_num_threads(case.threads)
    try:
        peak, seconds = first_calls(case)
        problem = make_problem(case)
        call = problem.call(case.provider, case.direction)
        benchmark.group = f"{case.study} {case.shape} {case.dtype} {case.direction}"
        benchmark.extra_info.update(case._asdict(), peak_bytes=peak)

        def once() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        if seconds < SECONDS:  # the profiler's share in a short call is large
            problem.restore()
            start = time.perf_counter()
            once()
            seconds = time.perf_counter() - start
        rounds = min(MOST, max(fewest, int(SECONDS / seconds)))
        # Every provider gets logits that were written just now, the one in place needs them:
        # all start from the same state of the caches.
        benchmark.pedantic(once, setup=problem.restore, rounds=rounds)
    finally:
        torch.set_num_threads(THREADS)


@functools.cache  # a case that is timed again is compared once
def first_calls(case: Case) -> tuple[int, float]:
    """Peak bytes, and about how many seconds a call takes.

    Raises:
        AssertionError: the provider disagrees with eager torch.
    """
    problem = make_problem(case)
    call = problem.call(case.provider, case.direction)
    # What is compiled for the shape, or allocated once whatever the shape.
    tiny = new_problem(TINY, case.dtype, case.weighting, case.dim, DEVICE)
    first = call if case.provider in COMPILED else tiny.call(case.provider, case.direction)
    problem.restore()
    first()
    problem.restore()
    found: list[tuple[Tensor, ...]] = []
    start = time.perf_counter()
    peak = peak_bytes(lambda: found.append(call()), DEVICE)
    seconds = time.perf_counter() - start
    problem.compare(case.provider, found[0])
    return (0 if case.provider == "copy" else peak), seconds


def make_problem(case: Case) -> Problem | LinearProblem:
    """The case's inputs; cases of one problem follow each other."""
    weighting = "uniform" if case.dim else case.weighting  # a linear problem has all of them
    return _kept_problem(case.shape, case.dtype, weighting, case.dim).weighted(case.weighting)


@functools.lru_cache(maxsize=1)
def _kept_problem(shape: Shape, dtype: str, weighting: str, dim: int) -> Problem | LinearProblem:
    torch._dynamo.reset()  # each shape is compiled for itself, within the limit of recompilations
    return new_problem(shape, dtype, weighting, dim, DEVICE)
