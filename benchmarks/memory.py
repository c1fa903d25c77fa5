"""Peak bytes of a call beyond what was there before it: exact and repeatable.

On the CPU from torch.profiler's `[memory]` events (every allocation and release, in order); on CUDA
from the allocator's own statistics.
"""

from collections.abc import Callable

import torch
from rich import box
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from wmtp.benchmarks.providers import PROVIDERS, make_arguments


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that `call` held at any moment, its results included.

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
    provider: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> int:
    """Peak bytes of loss and gradient beyond the logits."""
    logits, target_ids, head_weights = make_arguments(shape, dtype, device)
    logits = logits.detach()
    loss = PROVIDERS[provider]
    leaf = logits.requires_grad_()
    loss(*make_arguments((1, 2, 1, 2), dtype, device)).backward()  # one-time allocations

    def call() -> torch.Tensor:
        return torch.autograd.grad(loss(leaf, target_ids, head_weights), leaf)[0]

    return peak_bytes(call, device)


def profile_table(
    vocabularies: list[int], length: int, heads: int, dtype: torch.dtype, device: str
) -> Table:
    """Peak memory of each provider over the vocabularies, in MiB and in units of the logits."""
    table = Table(
        title=f"peak memory of loss + gradient beyond the logits [1, {length}, {heads}, V], "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        caption="MiB, and in units of the logits",
        box=box.SIMPLE,
    )
    table.add_column("V", justify="right")
    table.add_column("logits", justify="right")
    for provider in PROVIDERS:
        table.add_column(provider, justify="right", no_wrap=True)
    for vocabulary in vocabularies:
        shape = (1, length, heads, vocabulary)
        logits_bytes = length * heads * vocabulary * dtype.itemsize
        cells = []
        for provider in PROVIDERS:
            peak = loss_peak_bytes(provider, shape, dtype, device)
            cells.append(f"{peak / 2**20:.1f} {peak / logits_bytes:.3f}x")
        table.add_row(str(vocabulary), f"{logits_bytes / 2**20:.1f}", *cells)
    return table
