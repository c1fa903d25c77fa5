"""Peak bytes of a call beyond what was there before it: exact and repeatable.

On the CPU from torch.profiler's `[memory]` events (every allocation and release, in order); on CUDA
from the allocator's own statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

import wmtp
from wmtp.benchmarks.problem import Problem, Shape
from wmtp.benchmarks.providers import DIRECTIONS

if TYPE_CHECKING:
    from rich.table import Table

PROFILED = ("eager", "eager_float", "fused", "fused_inplace")  # compiling each shape takes long


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that `call` held at any moment, its results included.

    What the library keeps from one call to the next is given back first, so that it counts.

    >>> peak_bytes(lambda: (torch.empty(1000, dtype=torch.uint8), None)[1])
    1000
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    wmtp.release_memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def loss_peak_bytes(
    provider: str, direction: str, shape: Shape, dtype: torch.dtype, device: str
) -> int:
    """Peak bytes of the loss, and of its gradient unless "forward", beyond the logits."""
    tiny = Problem((1, 2, 1, 2), dtype, "given", device)
    tiny.call(provider, direction)()  # one-time allocations
    return peak_bytes(Problem(shape, dtype, "given", device).call(provider, direction), device)


def profile_table(
    vocabularies: list[int], length: int, heads: int, dtype: torch.dtype, device: str
) -> Table:
    """Peak memory of each provider, direction and vocabulary, in units of the logits."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"peak memory beyond the logits [1, {length}, {heads}, V], "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        caption="in units of the logits; forward: without gradient",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("V", "logits", "direction", *PROFILED):
        table.add_column(column, justify="left" if column == "direction" else "right", no_wrap=True)
    for vocabulary in vocabularies:
        shape = (1, length, heads, vocabulary)
        logits_bytes = length * heads * vocabulary * dtype.itemsize
        start = [str(vocabulary), f"{logits_bytes / 2**20:.1f} MiB"]
        for direction, contestants in DIRECTIONS.items():
            cells = [
                f"{loss_peak_bytes(provider, direction, shape, dtype, device) / logits_bytes:.3f}"
                if provider in contestants
                else ""
                for provider in PROFILED
            ]
            table.add_row(*start, direction, *cells)
            start = ["", ""]
        table.add_section()
    return table
