"""Peak bytes of a call, exact and repeatable; bytes still free.

On the CPU from torch.profiler's `[memory]` events (every allocation and release, in order); on CUDA
from the allocator's own statistics.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

import wmtp
from wmtp.benchmarks.problem import Problem, Shape
from wmtp.benchmarks.providers import LOGITS

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# By what /proc/self/cgroup calls the controller ("" in version 2): limit, usage, its caches' name.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
TINY = (1, 2, 1, 2)
MEBI = 2**20

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
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
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
    dim: int = 0,
    **options: Any,
) -> int:
    """Peak bytes of a loss, and of its gradients unless "forward", beyond its inputs.

    Args:
        dim: D, for the loss of hidden states and unembedding.
        options: of our own losses.
    """

    def call(shape: Shape) -> Callable[[], object]:
        problem = Problem(shape, dtype, device, dim)
        return problem.call(provider, direction, "uniform" if dim else "given", **options)

    step = call(shape)
    if not dim and LOGITS[provider].compiles:
        torch._dynamo.reset()  # each shape for itself, within the limit of recompilations
        step()  # compiles
    else:
        call(TINY)()  # one-time allocations
    return peak_bytes(step, device)


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
