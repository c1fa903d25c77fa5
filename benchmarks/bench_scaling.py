"""How the loss scales: from tiny to large, over threads, weightings, odd vocabularies, few rows.

pytest benchmarks/bench_scaling.py --benchmark-json=result.json     or: wmtp bench --only scaling
"""

from itertools import product

from wmtp.benchmarks.problem import THREADS, WEIGHTINGS, Case
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
USUAL, FEW_ROWS = (1, 256, 4, 32000), (1, 2, 1, 128256)  # the latter: one row with a target
ONE_AND_ALL = sorted({1, THREADS})
OUT_OF_PLACE, IN_PLACE = ("forward+backward", "fused"), ("inplace", "fused_inplace")
OURS = (OUT_OF_PLACE, IN_PLACE)
AGAINST_EAGER = (
    *(("forward", "eager"), ("forward", "fused")),
    *(("forward+backward", "eager"), OUT_OF_PLACE, IN_PLACE),
)
LARGE = [
    *(
        Case("threads", shrunk(USUAL), dtype, *ours, threads=threads)
        for dtype, ours, threads in product(DTYPES, OURS, ONE_AND_ALL)
    ),
    *(
        Case("weightings", shrunk((1, 256, 4, vocabulary)), dtype, *ours, weighting=weighting)
        for vocabulary, dtype, weighting, ours in product((32000, 128256), DTYPES, WEIGHTINGS, OURS)
    ),
    *(
        Case("odd vocabulary", shrunk((1, 256, 4, vocabulary)), dtype, *ours)
        for vocabulary, dtype, ours in product((50304, 50257), DTYPES, OURS)
    ),
    *(
        Case("few rows", shrunk(FEW_ROWS), dtype, *contestant, threads=threads)
        for dtype, contestant, threads in product(DTYPES, AGAINST_EAGER, ONE_AND_ALL)
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
