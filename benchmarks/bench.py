"""The suites of `wmtp bench`, by pytest-benchmark: what is timed, compared with what, and how.

    pytest benchmarks/bench.py --benchmark-json=result.json       # -k test_loss: one of the suites

    loss      with and without gradient against eager torch, torch.compile and a plain copy
    scaling   sizes, threads, weightings, odd vocabularies, few rows; inside torch.compile
    options   head numerics and metrics, of logits and of hidden states, against ours without; rules
              against uniform weights
    linear    hidden states to loss and gradients, against peers and the bare matrix products

The environment variable WMTP_BENCH_SIZE chooses how much there is to do: "full", "quick" (few and
short cases, nothing that compiles) or "tiny" (the suites' own tests).
"""

import functools
import os
import time
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch

from wmtp.benchmarks.problem import RULES, SELECTIONS, THREADS, WEIGHTINGS, Case, Shape
from wmtp.benchmarks.providers import (
    DIRECTIONS,
    FLOORS,
    GRAD_HEADS,
    LINEAR,
    LOGITS,
    LOGITS_OPTIONS,
    UNCOMPILED,
    absent,
)
from wmtp.benchmarks.timing import Bench, Rounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "bfloat16")
SIZE = os.environ.get("WMTP_BENCH_SIZE", "full")
ROUNDS = {"full": Rounds(0.5, 5, 1000), "quick": Rounds(0.3, 5, 1000), "tiny": Rounds(0.0, 2, 2)}
BENCH = Bench(DEVICE)
BOTH = "forward+backward"


def shrunk(shape: Shape) -> Shape:
    """The shape itself; a few elements when the size is "tiny"."""
    if SIZE != "tiny":
        return shape
    batch, length, heads, vocabulary = shape
    return min(batch, 2), min(length, 8), min(heads, 4), max(2, vocabulary // 100)


def cases(study: str, shapes: list[Shape], ways: Iterable[Any], **varied: Any) -> list[Case]:
    """What varies last stands side by side: the speed of memory may drift from minute to minute."""
    found = []
    for shape, dtype, way, *values in product(shapes, DTYPES, ways, *varied.values()):
        fields = {"shape": shape, **dict(zip(varied, values, strict=True))}
        case = Case(study, fields.pop("shape"), dtype, *way, **fields)
        found.append(case._replace(shape=shrunk(case.shape)))
    return found


# --- loss and scaling ----------------------------------------------------------------------------

SHAPES = [
    (1, 256, 4, 32000),  # Llama 2
    (1, 256, 4, 50257),  # GPT-2
    (1, 256, 4, 128256),  # Llama 3
    (1, 128, 4, 151936),  # Qwen
    (1, 128, 4, 256000),  # Gemma
    *((1, 1024 // heads, heads, 32000) for heads in (1, 2, 8)),
]
EVERYONE = [(way, name) for way, names in DIRECTIONS.items() for name in (*names, "copy")]
LOSS = cases("loss", SHAPES[: None if SIZE == "full" else 1], EVERYONE)

SWEEP = [
    *((1, 4, 1, 64), (1, 16, 1, 1000), (1, 16, 4, 256), (1, 64, 4, 1000), (1, 64, 4, 8192)),
    *((2, 128, 2, 32000), (1, 64, 4, 50257), (4, 128, 4, 16000), (4, 512, 4, 32000)),
]
USUAL, FEW_ROWS = (1, 256, 4, 32000), (1, 2, 1, 256000)  # the latter: one row with a target
LARGE, EVEN, ODD = ((1, 256, 4, vocabulary) for vocabulary in (128256, 50304, 50257))
ONE_AND_ALL = sorted({1, THREADS})
FORWARD, OURS = ("forward", "fused"), ((BOTH, "fused"), ("inplace", "fused_inplace"))
AGAINST_EAGER = (("forward", "eager"), FORWARD, (BOTH, "eager"), *OURS)
IN_AND_OUT = [(BOTH, name) for ours in UNCOMPILED.items() for name in reversed(ours)]
SCALING = cases("sweep", SWEEP[: {"full": None, "quick": 4, "tiny": 1}[SIZE]], AGAINST_EAGER)
if SIZE != "quick":
    SCALING += [
        *cases("threads", [USUAL], (FORWARD, *OURS), threads=ONE_AND_ALL),
        *cases("weightings", [USUAL, LARGE], OURS, weighting=WEIGHTINGS),
        *cases("odd vocabulary", [USUAL], OURS, shape=(EVEN, ODD)),
        *cases("few rows", [FEW_ROWS], AGAINST_EAGER, threads=ONE_AND_ALL),
        *cases("compiled", [USUAL], IN_AND_OUT),
    ]

# --- linear --------------------------------------------------------------------------------------

LINEAR_SHAPES = {
    "full": [(1, 256, 4, 32000), (1, 256, 4, 128256)],
    "quick": [(1, 64, 4, 32000)],
    "tiny": [(1, 64, 4, 32000)],
}[SIZE]
DIM = {"full": 512, "quick": 512, "tiny": 16}[SIZE]
# A call may take seconds, and machines drift: everyone is called in turn, and then once more.
PASSES = {"full": 3, "quick": 2, "tiny": 2}[SIZE]
ONCE = ("linear_cross_entropy",)  # takes as long as all others together
SLOWER = ("eager_float",)  # than eager, and the same in float32; `wmtp profile` has its memory
CONTESTANTS = [
    *((BOTH, "fused", weighting) for weighting in ("given", "ref_ce", *SELECTIONS)),
    *((BOTH, provider, "uniform") for provider in GRAD_HEADS),
    *((BOTH, provider, "uniform") for provider in LINEAR if provider not in SLOWER),
    (BOTH, FLOORS[BOTH], "uniform"),
    ("frozen", "fused", "uniform"),
    ("frozen", FLOORS["frozen"], "uniform"),
]
LINEAR_CASES = [
    Case("linear", shrunk(shape), dtype, *contestant, dim=DIM)
    for shape, dtype, number in product(LINEAR_SHAPES, DTYPES, range(PASSES))
    for contestant in CONTESTANTS
    if number == 0 or contestant[1] not in ONCE
]

# --- options -------------------------------------------------------------------------------------

WITH_OPTIONS = ("fused", *LOGITS_OPTIONS)
OPTION_CASES = [
    *cases("options", [USUAL], product(("forward", BOTH), WITH_OPTIONS)),
    *cases("rules", [USUAL], [(BOTH, "fused")], weighting=("uniform", *RULES)),
    *PASSES * cases("options", [USUAL], product((BOTH,), WITH_OPTIONS), dim=(DIM,)),
]

# --- how -----------------------------------------------------------------------------------------


def present(cases: list[Case], contestants: Iterable[str]) -> pytest.MarkDecorator:
    """The test function's `case`: those whose provider is here."""
    left_out = set(contestants)
    cases = [case for case in cases if case.provider not in left_out]
    return pytest.mark.parametrize("case", cases, ids=str)


@present(LOSS, absent(LOGITS, SIZE == "full"))
def test_loss(benchmark, case):
    time_case(benchmark, case)


@present(SCALING, absent(LOGITS, SIZE == "full"))
def test_scaling(benchmark, case):
    time_case(benchmark, case)


@present(OPTION_CASES, ())
def test_options(benchmark, case):
    time_case(benchmark, case, fewest=1 if case.dim else ROUNDS[SIZE].fewest)


@present(LINEAR_CASES, absent(LINEAR, SIZE == "full"))
def test_linear(benchmark, case):
    time_case(benchmark, case, fewest=1)


def time_case(benchmark, case: Case, fewest: int = ROUNDS[SIZE].fewest) -> None:
    """Compare with the truth, count peak bytes, then time."""
    torch.set_num_threads(case.threads)
    rounds = ROUNDS[SIZE]._replace(fewest=fewest)
    try:
        peak, seconds = first_calls(case)
        problem = BENCH.problem_of(case)
        call = problem.call(case.provider, case.direction, case.weighting)
        benchmark.group = f"{case.study} {case.shape} {case.dtype} {case.direction}"
        benchmark.extra_info.update(case.fields(), peak_bytes=peak)

        def once() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        if seconds < rounds.seconds:  # the profiler's share in a short call is large
            problem.restore()
            start = time.perf_counter()
            once()
            seconds = time.perf_counter() - start
        # Every provider gets logits that were written just now, the one in place needs them:
        # all start from the same state of the caches.
        benchmark.pedantic(once, setup=problem.restore, rounds=rounds.of(seconds))
    finally:
        torch.set_num_threads(THREADS)


@functools.cache  # a case that is timed again is compared once
def first_calls(case: Case) -> tuple[int, float]:
    """Peak bytes, and about how many seconds a call takes."""
    return BENCH.first_calls(case)[:2]
