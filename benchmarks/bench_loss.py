"""Loss and gradient against eager torch and against a plain copy of the logits.

pytest benchmarks/bench_loss.py --benchmark-json=result.json        or: wmtp bench
"""

import os

import pytest
import torch

from wmtp.benchmarks.memory import loss_peak_bytes
from wmtp.benchmarks.providers import PROVIDERS, make_arguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = os.environ.get("WMTP_BENCH_QUICK") == "1"
SHAPES = [(1, 256, 4, 32000), (1, 64, 4, 50257), (1, 64, 4, 128256)][: 1 if QUICK else None]
DTYPES = [torch.float32, torch.bfloat16]
DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
# Outputs must agree before anything is timed; native 16-bit eager rounds its CE.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


def _rounds(benchmark, call):
    def once():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5 if QUICK else 15, warmup_rounds=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_loss_and_gradient(benchmark, shape, dtype, provider):
    arguments = make_arguments(shape, dtype, DEVICE)
    truth = PROVIDERS["eager_float"](*arguments).item()
    loss = PROVIDERS[provider]
    assert loss(*arguments).item() == pytest.approx(truth, rel=TOLERANCE[dtype])
    _describe(benchmark, shape, dtype, provider)
    benchmark.extra_info["peak_bytes"] = loss_peak_bytes(provider, shape, dtype, DEVICE)
    logits = arguments[0]
    _rounds(benchmark, lambda: torch.autograd.grad(loss(*arguments), logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_copy(benchmark, shape, dtype):
    """The limit: one read and one write of the logits."""
    logits = make_arguments(shape, dtype, DEVICE)[0].detach()
    destination = torch.empty_like(logits)
    _describe(benchmark, shape, dtype, "copy")
    benchmark.extra_info["peak_bytes"] = 0
    _rounds(benchmark, lambda: destination.copy_(logits))


def _describe(benchmark, shape, dtype, provider):
    dtype_name = str(dtype).removeprefix("torch.")
    benchmark.group = f"{shape} {dtype_name}"
    benchmark.extra_info.update(
        provider=provider,
        shape=list(shape),
        dtype=dtype_name,
    )
