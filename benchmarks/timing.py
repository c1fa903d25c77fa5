"""How one case is compared, measured and timed; what bench_loss.py and bench_scaling.py share.

The environment variable WMTP_BENCH_SIZE chooses how much there is to do: "full", "quick" (few and
short cases, nothing that compiles) or "tiny" (the suite's own tests).
"""

import functools
import os
import time

import pytest
import torch

from wmtp.benchmarks.memory import peak_bytes
from wmtp.benchmarks.problem import THREADS, Case, Problem, Shape
from wmtp.benchmarks.providers import absent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "bfloat16")
SIZE = os.environ.get("WMTP_BENCH_SIZE", "full")
# Rounds are what fits into so many seconds, at least and at most so many.
SECONDS, FEWEST = {"full": (0.5, 5), "quick": (0.3, 5), "tiny": (0.0, 2)}[SIZE]
MOST = 1000


def suite(cases: list[Case]) -> pytest.MarkDecorator:
    """The test function's `case`: those that can run here."""
    left_out = absent(compiling=SIZE == "full")
    return pytest.mark.parametrize(
        "case", [case for case in cases if case.provider not in left_out], ids=str
    )


def shrunk(shape: Shape) -> Shape:
    """The shape itself; a few elements when the size is "tiny"."""
    if SIZE != "tiny":
        return shape
    batch, length, heads, vocabulary = shape
    return min(batch, 2), min(length, 8), min(heads, 4), max(2, vocabulary // 100)


def time_case(benchmark, case: Case) -> None:
    """Compare with the truth, count peak bytes, then time."""
    torch.set_num_threads(case.threads)
    try:
        problem = make_problem(case.shape, case.dtype, case.weighting)
        problem.check(case.provider, case.direction)
        call = problem.call(case.provider, case.direction)
        problem.restore()
        peak = peak_bytes(call, DEVICE) if case.provider != "copy" else 0
        benchmark.group = f"{case.study} {case.shape} {case.dtype} {case.direction}"
        benchmark.extra_info.update(case._asdict(), peak_bytes=peak)

        def once() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        # Every provider gets logits that were written just now, the one in place needs them:
        # all start from the same state of the caches.
        start = time.perf_counter()
        problem.restore()
        once()
        rounds = min(MOST, max(FEWEST, int(SECONDS / (time.perf_counter() - start))))
        benchmark.pedantic(once, setup=problem.restore, rounds=rounds)
    finally:
        torch.set_num_threads(THREADS)


@functools.lru_cache(maxsize=1)  # cases of one problem follow each other
def make_problem(shape: Shape, dtype: str, weighting: str) -> Problem:
    torch._dynamo.reset()  # each shape is compiled for itself, within the limit of recompilations
    return Problem(shape, getattr(torch, dtype), weighting, DEVICE)
