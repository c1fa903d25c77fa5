"""How the loss scales: sizes, threads, weightings, odd vocabularies, few rows; torch.compile.

pytest benchmarks/bench_scaling.py --benchmark-json=result.json     or: wmtp bench --only scaling
"""

from itertools import product

from wmtp.benchmarks.problem import THREADS, WEIGHTINGS, Case
from wmtp.benchmarks.providers import UNCOMPILED
from wmtp.benchmarks.timing import DTYPES, SIZE, shrunk, suite, time_case

SWEEP = [
    (1, 4, 1, 64),
    (1, 16, 1, 1000),
    (1, 16, 4, 256),
    (1, 64, 4, 1000),
    (1, 64, 4, 8192),
    (2, 128, 2, 32000),
    (1, 64, 4, 50257),
    (4, 128, 4, 16000),
    (4, 512, 4, 32000),
]
USUAL, FEW_ROWS = (1, 256, 4, 32000), (1, 2, 1, 256000)  # the latter: one row with a target
ONE_AND_ALL = sorted({1, THREADS})
FORWARD, OUT_OF_PLACE, IN_PLACE = (
    ("forward", "fused"),
    ("forward+backward", "fused"),
    ("inplace", "fused_inplace"),
)
OURS = (OUT_OF_PLACE, IN_PLACE)
AGAINST_EAGER = (
    *(("forward", "eager"), FORWARD),
    *(("forward+backward", "eager"), OUT_OF_PLACE, IN_PLACE),
)
# What is compared stands side by side: the speed of memory may drift from one minute to the next.
LARGE = [
    *(
        Case("threads", shrunk(USUAL), dtype, *ours, threads=threads)
        for dtype, ours, threads in product(DTYPES, (FORWARD, *OURS), ONE_AND_ALL)
    ),
    *(
        Case("weightings", shrunk((1, 256, 4, vocabulary)), dtype, *ours, weighting=weighting)
        for vocabulary, dtype, ours, weighting in product((32000, 128256), DTYPES, OURS, WEIGHTINGS)
    ),
    *(
        Case("odd vocabulary", shrunk((1, 256, 4, vocabulary)), dtype, *ours)
        for dtype, ours, vocabulary in product(DTYPES, OURS, (50304, 50257))
    ),
    *(
        Case("few rows", shrunk(FEW_ROWS), dtype, *contestant, threads=threads)
        for dtype, contestant, threads in product(DTYPES, AGAINST_EAGER, ONE_AND_ALL)
    ),
    *(
        Case("compiled", shrunk(USUAL), dtype, "forward+backward", provider)
        for dtype, ours in product(DTYPES, UNCOMPILED.items())
        for provider in reversed(ours)
    ),
]
CASES = [
    *(
        Case("sweep", shrunk(shape), dtype, *contestant)
        for shape, dtype, contestant in product(
            SWEEP[: {"full": None, "quick": 4, "tiny": 1}[SIZE]], DTYPES, AGAINST_EAGER
        )
    ),
    *(LARGE if SIZE != "quick" else []),
]


@suite(CASES)
def test_scaling(benchmark, case):
    time_case(benchmark, case)
