"""The linear loss against its peers, and against the matrix products that none can do without.

pytest benchmarks/bench_linear.py --benchmark-json=result.json      or: wmtp bench --linear
"""

from itertools import product

from wmtp.benchmarks.linear_providers import PROVIDERS, absent
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.timing import DTYPES, SIZE, shrunk, suite, time_case

SHAPES = {
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
    *(("forward+backward", "fused", weighting) for weighting in ("given", "ref_ce")),
    *(
        ("forward+backward", provider, "uniform")
        for provider in PROVIDERS
        if provider not in SLOWER
    ),
    ("forward+backward", "three_products", "uniform"),
    ("frozen", "fused", "uniform"),
    ("frozen", "two_products", "uniform"),
]
CASES = [
    Case("linear", shrunk(shape), dtype, *contestant, dim=DIM)
    for shape, dtype, number in product(SHAPES, DTYPES, range(PASSES))
    for contestant in CONTESTANTS
    if number == 0 or contestant[1] not in ONCE
]


@suite(CASES, absent)
def test_linear(benchmark, case):
    time_case(benchmark, case, fewest=1)
