"""The linear loss in the GPU suite: what is timed, what an H100 is predicted to take, the table."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import COPY_SHARE, PREDICTED_CARD, Job
from wmtp.benchmarks.linear_problem import plan_of
from wmtp.benchmarks.linear_providers import DIRECTIONS, FLOORS, PROVIDERS
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.report import floor_of, gradient_bytes

Record = dict[str, Any]
# [B, S, H, V] and D of Llama 3 8B, Llama 2 7B, and Gemma 2 2B as Cut Cross Entropy's table has it.
SIZES = (
    ((1, 1024, 4, 128256), 4096),
    ((1, 1024, 4, 32000), 4096),
    ((1, 2048, 4, 256000), 2304),
)
# Those who are timed after ours, the bare products and eager torch, in this order.
LATE = ("compiled", "eager_float", "linear_cross_entropy", "cce", "liger")
FLOPS = 989e12  # a second, of dense bfloat16 products: the data sheet of PREDICTED_CARD
COLUMNS = (
    "[B, S, H, V] x D", "dtype", "provider", "weights", "median ms", "20-80 %", "TFLOP/s",
    "of products", "MiB", f"predicted ms ({PREDICTED_CARD.name})",
)  # fmt: skip
NOTE = (
    "Linear: hidden states times unembedding, a loss and gradients; `frozen` is without the "
    "unembedding's. `of products` is the time of the bare matrix products over that of the "
    "provider, TFLOP/s counts these products alone, MiB is memory beyond hidden states, "
    "unembedding and their gradients. linear_cross_entropy and liger have no weights. The gradient "
    "filter of cce drops what is small, which of random logits is nearly all. Predicted: each "
    f"product takes the longer of its operations at {FLOPS / 1e12:.0f} TFLOP/s, the data sheet's, "
    "and its bytes; what the kernel reads and writes is added."
)


def linear_jobs(absent: Iterable[str] = ()) -> list[Job]:
    """Everyone who is here at every size: ours, the products and eager torch, then the peers.

    A peer may take minutes to tune itself, or a second a call.
    """
    both = "forward+backward"
    ours = [
        *((both, "fused", weighting) for weighting in ("uniform", "given", "ref_ce")),
        *((direction, floor, "uniform") for direction, floor in DIRECTIONS.items()),
        ("frozen", "fused", "uniform"),
        (both, "eager", "uniform"),
    ]
    others = [name for name in PROVIDERS if name not in ("fused", "eager", *absent)]
    others.sort(key=LATE.index)
    return [
        Job(Case("linear", shape, "bfloat16", *contestant, dim=dim))
        for contestants in (ours, *([(both, other, "uniform")] for other in others))
        for (shape, dim), contestant in product(SIZES, contestants)
    ]


def products_flops(case: Case) -> int:
    """Of the products of the rows with a target: 2 D V a row for each."""
    count = 2 if case.direction == "frozen" else 3
    return count * 2 * _rows(case) * case.dim * case.shape[3]


def predicted_linear_ms(case: Case) -> float | None:
    """The roofline, chunk by chunk; None for other people's code."""
    if case.provider in FLOORS:
        return 1e3 * _products_seconds(case, _rows(case), 0, False)
    if case.provider != "fused":
        return None
    linear = plan_of(case.shape, case.dim, getattr(torch, case.dtype))
    rows, most = _rows(case), linear.chunk_tokens * case.shape[2]
    chunks = -(-rows // most)
    summed = chunks > 1 and case.direction != "frozen"
    seconds = sum(
        _products_seconds(case, rows // chunks, number, summed) for number in range(chunks)
    )
    size = linear.weight.numel()
    moved = 2 * rows * case.shape[3] * linear.dtype.itemsize  # the kernel, in place
    moved += size * (linear.accum_dtype.itemsize + linear.dtype.itemsize) if summed else 0
    return 1e3 * (seconds + _seconds(moved))


def compared_linear(records: list[Record]) -> list[Record]:
    """The records with what follows from them: share of the products, TFLOP/s, MiB, prediction."""
    floors = {
        case_of(record): record["median_ms"]
        for record in records
        if record["provider"] in FLOORS and record["outcome"] == "ok"
    }
    return [_compared(record, floors.get(floor_of(case_of(record)))) for record in records]


def linear_cells(record: Record) -> list[str]:
    """A row under COLUMNS."""
    measured = record["outcome"] == "ok"
    predicted, share = record["predicted_ms"], record.get("of_products")
    times = f"{record['median_ms']:.3f}" if measured else ""
    return [
        f"{'x'.join(map(str, record['shape']))} x {record['dim']}",
        record["dtype"],
        record["provider"],
        record["weighting"] if record["provider"] not in FLOORS else "",
        times,
        f"{record['p20_ms']:.3f}-{record['p80_ms']:.3f}" if measured else "",
        f"{record['tflops']:.0f}" if measured else "",
        "" if share is None else f"{100 * share:.0f} %",
        f"{record['mib']:.1f}" if measured else "",
        "" if predicted is None else f"{predicted:.3f} *predicted*",
    ]


def case_of(record: Record) -> Case:
    fields = {name: record[name] for name in Case._fields if name in record}
    return Case(**{**fields, "shape": tuple(record["shape"])})


def _compared(record: Record, floor_ms: float | None) -> Record:
    case = case_of(record)
    record = {**record, "predicted_ms": predicted_linear_ms(case)}
    if record["outcome"] != "ok":
        return record
    return {
        **record,
        "tflops": round(products_flops(case) / (1e9 * record["median_ms"]), 1),
        "of_products": round(floor_ms / record["median_ms"], 4) if floor_ms else None,
        "mib": round((record["peak_bytes"] - gradient_bytes(case)) / 2**20, 2),
    }


def _products_seconds(case: Case, rows: int, number: int, summed: bool) -> float:
    """The products of chunk `number`; the weight's gradient is added to a sum, or written."""
    vocabulary, itemsize = case.shape[3], getattr(torch, case.dtype).itemsize
    logits, x, weight = rows * vocabulary, rows * case.dim, vocabulary * case.dim
    operations = 2 * rows * vocabulary * case.dim / FLOPS
    moved = [itemsize * (logits + x + weight)] * 2
    if case.direction != "frozen":
        gradient = 4 * weight * (1 + (number > 0)) if summed else itemsize * weight
        moved.append(itemsize * (logits + x) + gradient)
    return sum(max(operations, _seconds(count)) for count in moved)


def _seconds(moved: int) -> float:
    return moved / (COPY_SHARE * PREDICTED_CARD.bytes_a_second)


def _rows(case: Case) -> int:
    """With a target: head k has none in the last k + 1 tokens."""
    batch, length, heads, _ = case.shape
    return batch * sum(max(length - 1 - head, 0) for head in range(heads))
