"""Compiles what the other steps will launch, many at once, into Triton's cache on disk.

The library is called as it will be, on as few tokens as select the same kernels, and what it
launches is compiled and not run.
"""

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import OURS, Job, forced_as
from wmtp.benchmarks.gpu_processes import (
    WORKER,
    Record,
    in_parallel,
    read_records,
    run,
    run_jobs_in_processes,
)
from wmtp.benchmarks.gpu_worker import JOB_SECONDS, ONE_CALLS, first_line, forced
from wmtp.benchmarks.linear_problem import new_problem

MOST_PROCESSES = 16  # each has a CUDA context of its own
FEWEST_TOKENS = 8  # some of which have a target for every head


def processes() -> int:
    return min(os.cpu_count() or 1, MOST_PROCESSES)


def parts(jobs: Iterable[Job], count: int) -> list[list[Job]]:
    """Our jobs for so many processes: in one those that share kernels, whatever their tokens are.

    The longest rows, which take longest, come first.
    """
    ours = {
        (*_kernels_of(job), *job[1:], job.case.provider, job.case.direction): job
        for job in jobs
        if job.case.provider in OURS
    }
    ordered = sorted(ours.values(), key=_kernels_of)
    groups = [list(group) for _, group in itertools.groupby(ordered, _kernels_of)]
    return [list(itertools.chain(*groups[number::count])) for number in range(count)]


def compile_in_processes(
    name: str, jobs: Iterable[Job], seconds: float, scratch: Path
) -> list[Record]:
    """A record a job, in no order.

    Args:
        name: of the worker that compiles the same jobs.
        scratch: a folder.
    """
    shares = list(enumerate(filter(None, parts(jobs, processes()))))

    def compile_share(share: tuple[int, list[Job]]) -> list[Record]:
        number, mine = share
        file = scratch / f"{name}-{number}.jsonl"
        command = [*WORKER, name, "--part", f"{number}/{processes()}"]
        why = run_jobs_in_processes(
            command, file, len(mine), seconds, lambda i, why: new_record(mine[i], "failed", why)
        )
        found = read_records(file)
        return found + [new_record(job, "not run", why) for job in mine[len(found) :]]

    return list(itertools.chain(*in_parallel(compile_share, shares, processes())))


def call_in_processes(seconds: float, scratch: Path) -> list[Record]:
    """Run what compute-sanitizer will run, a process a call: it compiles, and is a sign of life."""

    def call(number: int) -> Record:
        vocabulary, tier = ONE_CALLS[number]
        output = scratch / f"call-{number}.txt"
        part = f"{number}/{len(ONE_CALLS)}"
        status = run([*WORKER, "one-call", "--part", part], seconds, output)
        why = "" if status == 0 else f"exit status {status}: {_last_line(output)}"
        record = {"case": f"a call, V = {vocabulary}, {tier}", "why": why}
        return {**record, "outcome": "failed" if why else "ok"}

    return in_parallel(call, range(len(ONE_CALLS)), processes())


def compile_jobs(
    jobs: list[Job], first: int, seconds: float, records: Path, device: str = "cuda"
) -> int:
    """In a process of its own: compile jobs[first:], a line of JSON a job; the exit status."""
    deadline = time.monotonic() + seconds
    for job in jobs[first:]:
        if time.monotonic() > deadline:
            break
        signal.alarm(JOB_SECONDS)
        record = compile_job(job, device)
        signal.alarm(0)
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return 0


def compile_job(job: Job, device: str) -> Record:
    """Outcomes: ok, refused (there is no such tier), failed."""
    start = time.monotonic()
    try:
        with compile_only() as binaries:
            _call(job, device)
    except Exception as error:  # also what the compiler raises
        refused = job.tier and isinstance(error, ValueError)
        return new_record(job, "refused" if refused else "failed", first_line(error))
    seconds = round(time.monotonic() - start, 2)
    return {**new_record(job, "ok"), "seconds": seconds, "binaries": sorted(binaries)}


@contextlib.contextmanager
def compile_only() -> Iterator[set[str]]:
    """A launch ends before the device: Triton's own warm-up. Yields the binaries' hashes."""
    from triton.runtime.jit import JITFunction

    whole: Any = JITFunction.run
    binaries = set()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = whole(self, *arguments, grid=grid, warmup=True, **options)
        binaries.add(kernel.hash)
        return kernel

    JITFunction.run = run
    try:
        yield binaries
    finally:
        JITFunction.run = whole


def new_record(job: Job, outcome: str, why: str = "") -> Record:
    case = job.case
    told = [*case.shape[2:], case.dtype, case.direction, case.weighting]
    told += [f"D = {case.dim}"] if case.dim else []
    told += [forced_as(job.tier, job.ctas_per_sm)] if job.tier else []
    return {"case": ", ".join(map(str, told)), "outcome": outcome, "why": why}


def _call(job: Job, device: str) -> None:
    from wmtp.kernels import tiers

    case = job.case
    # With fewer tokens than SMs a row would be split between several, by other kernels.
    tokens = max(tiers.machine(torch.device(device)).processors, FEWEST_TOKENS)
    shape = (1, tokens, *case.shape[2:])
    with forced(job, device):
        problem = new_problem(shape, case.dtype, case.weighting, case.dim, device)
        problem.call(case.provider, case.direction)()


def _kernels_of(job: Job) -> tuple[int, int, str, int, str]:
    heads, vocabulary = job.case.shape[2:]
    return -vocabulary, -heads, job.case.dtype, job.case.dim, job.case.weighting


def _last_line(file: Path) -> str:
    return (file.read_text().strip().splitlines() or [""])[-1][:200]
