"""The loss, with and without gradient, against eager torch, torch.compile and a plain copy.

pytest benchmarks/bench_loss.py --benchmark-json=result.json        or: wmtp bench --only loss
"""

from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import DIRECTIONS
from wmtp.benchmarks.timing import DTYPES, SIZE, shrunk, suite, time_case

SHAPES = [
    (1, 256, 4, 32000),  # Llama 2
    (1, 256, 4, 50257),  # GPT-2
    (1, 256, 4, 128256),  # Llama 3
    (1, 128, 4, 151936),  # Qwen
    (1, 128, 4, 256000),  # Gemma
    *((1, 1024 // heads, heads, 32000) for heads in (1, 2, 8)),
]
CASES = [
    Case("loss", shrunk(shape), dtype, direction, provider)
    for shape in SHAPES[: None if SIZE == "full" else 1]
    for dtype in DTYPES
    for direction, providers in DIRECTIONS.items()
    for provider in (*providers, "copy")
]


@suite(CASES)
def test_loss(benchmark, case):
    time_case(benchmark, case)
