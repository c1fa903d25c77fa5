"""Peak bytes of a call beyond what was there before it, exact and repeatable; bytes still free.

On the CPU from torch.profiler's `[memory]` events (every allocation and release, in order); on CUDA
from the allocator's own statistics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import wmtp
from wmtp.benchmarks.linear_problem import LinearProblem
from wmtp.benchmarks.problem import Problem, Shape
from wmtp.benchmarks.providers import COMPILED

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# By what /proc/self/cgroup calls the controller ("" in version 2): limit, usage, its caches' name.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


# Above all of its levels: libkineto says something for each beginning and end of a profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


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
    provider: str,
    direction: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    backend: str = "auto",
) -> int:
    """Peak bytes of the loss, and of its gradient unless "forward", beyond the logits.

    Args:
        provider: of PROVIDERS.
        direction: of DIRECTIONS.
        shape: of the logits.
        dtype: of the logits.
        device: "cpu" or "cuda".
        backend: of the fused losses.
    """
    call = _step(Problem(shape, dtype, "given", device), provider, direction, backend)
    if provider in COMPILED:
        torch._dynamo.reset()  # each shape for itself, within the limit of recompilations
        call()  # compiles
    else:
        tiny = Problem((1, 2, 1, 2), dtype, "given", device)
        _step(tiny, provider, direction, backend)()  # one-time allocations
    return peak_bytes(call, device)


def linear_peak_bytes(
    provider: str,
    direction: str,
    shape: Shape,
    dim: int,
    dtype: torch.dtype,
    device: str,
    **options: Any,
) -> int:
    """Peak bytes of the linear loss and its gradients beyond hidden states and weight.

    Args:
        provider, direction: of linear_providers, nothing that compiles.
        shape: of the logits.
        dim: D.
        dtype: of hidden states and weight.
        device: "cpu" or "cuda".
        options: of the fused loss.
    """
    tiny = LinearProblem((1, 2, 1, 2), dim, dtype, device)
    tiny.call(provider, direction, **options)()  # one-time allocations
    problem = LinearProblem(shape, dim, dtype, device)
    return peak_bytes(problem.call(provider, direction, **options), device)


def _step(problem: Problem, provider: str, direction: str, backend: str) -> Callable[[], object]:
    """The problem's own call; of the fused losses with the backend that was asked for."""
    if backend == "auto" or not provider.startswith("fused"):
        return problem.call(provider, direction)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(direction != "forward"):
            loss = wmtp.fused_weighted_mtp_loss(
                problem.logits,
                problem.target_ids,
                *problem.weights[:1],
                inplace=direction == "inplace",
                backend=backend,
            ).loss
        if direction == "forward":
            return (loss,)
        return loss, *torch.autograd.grad(loss, problem.logits)

    return step


def available_bytes() -> int:
    """Main memory that can still be had: what the system has left, or less by a cgroup's limit."""
    return min([_system_bytes(), *_cgroup_bytes()])


def _system_bytes() -> int:
    meminfo = PROC / "meminfo"
    if not meminfo.exists():  # macOS, which counts nothing like it: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * _numbers(meminfo)["MemAvailable:"]


def _cgroup_bytes() -> Iterator[int]:
    """What each group above this process has left, the files that it caches counted as free."""
    groups = PROC / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUPS / controllers
        limit, used, cache = CGROUP_FILES[controllers]
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            if not (folder / limit).exists() or (folder / limit).read_text() == "max\n":
                continue
            cached = _numbers(folder / "memory.stat").get(cache, 0)
            yield int((folder / limit).read_text()) - int((folder / used).read_text()) + cached


def _numbers(file: Path) -> dict[str, int]:
    """Of a file with a name and a number a line."""
    return {name: int(number) for name, number, *_ in map(str.split, file.read_text().splitlines())}
