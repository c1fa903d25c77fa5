"""Runs the suite, gathers what it measured, and takes the ratios: each within one run."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import wmtp
from wmtp.backends import cpu
from wmtp.benchmarks import linear_providers, providers
from wmtp.benchmarks.problem import Case

SUITES = {"loss": "bench_loss.py", "scaling": "bench_scaling.py", "linear": "bench_linear.py"}
OF_LOGITS = ("loss", "scaling")
# Measured anew in each run, so one value a run.
TIMES = ("median_ms", "q1_ms", "q3_ms")
SERIES = ("rounds", *TIMES)


def run_suites(
    suites: Iterable[str], size: str, show: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Time everything once, in a process of its own.

    Args:
        suites: of SUITES.
        size: "full", "quick" or "tiny".
        show: is given a line at the start and after each case.

    Returns:
        what pytest-benchmark writes.

    Raises:
        RuntimeError: a suite failed (outputs that disagree, for one); carries its output.
    """
    files = [str(Path(__file__).with_name(SUITES[suite])) for suite in suites]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        arguments = ["-x", "-vv", *files, "-p", "no:cacheprovider", f"--benchmark-json={file}"]
        show("pytest-benchmark is starting")
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "pytest", *arguments],
            env={**os.environ, "WMTP_BENCH_SIZE": size},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if case := re.match(r"\S+\.py::\S+\[(.*)\] ", line):
                    show(case[1])
        if process.returncode != 0:
            raise RuntimeError(f"the benchmark suite failed:\n{''.join(output)}")
        return json.loads(file.read_text())


def gather(command: str, size: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Environment and the results of all runs, ready for JSON."""
    cases = _merge([_case(benchmark) for benchmark in run["benchmarks"]] for run in runs)
    contest = linear_providers if any(case["dim"] for case in cases) else providers
    return {
        "command": command,
        "environment": environment(runs[0]["machine_info"]["cpu"].get("brand_raw", "")),
        "absent": contest.absent(compiling=size == "full"),
        "cases": cases,
    }


def environment(processor: str) -> dict[str, Any]:
    """What a reader needs to know to repeat the numbers."""
    packages = ("torch", "cut-cross-entropy", "pytest-benchmark")
    return {
        "cpu": processor,
        "instruction_set": None if cpu.unavailable() else cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "wmtp": wmtp.__version__,
    }


def cases_by_key(results: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """The results of `gather`, or of its JSON, by what identifies them."""
    return {_key(case): case for case in results["cases"]}


def in_units_of(case: dict[str, Any], peer: dict[str, Any]) -> list[float]:
    """The case's time per element of the logits in units of its peer's, run by run."""
    elements = torch.Size(peer["shape"]).numel() / torch.Size(case["shape"]).numel()
    pairs = zip(case["median_ms"], peer["median_ms"], strict=True)
    return [elements * mine / other for mine, other in pairs]


def peer_of(case: Case, provider: str) -> Case:
    """What the case is compared with; in place is an answer to forward + backward."""
    if case.direction == "inplace" and provider != "copy":
        case = case._replace(direction="forward+backward")
    return case._replace(provider=provider)


def floor_of(case: Case) -> Case:
    """The matrix products that a linear case cannot do without."""
    floor = linear_providers.DIRECTIONS[case.direction]
    return case._replace(provider=floor, weighting="uniform")


def gradient_bytes(case: Case) -> int:
    """Of what a linear case hands out: the hidden states' gradient, and the weight's."""
    rows, vocabulary = torch.Size(case.shape[:3]).numel(), case.shape[3]
    whose = rows if case.direction == "frozen" else rows + vocabulary
    return whose * case.dim * getattr(torch, case.dtype).itemsize


def logits_bytes(case: Case) -> int:
    return torch.Size(case.shape).numel() * getattr(torch, case.dtype).itemsize


def gigabytes_per_second(case: Case, median_ms: float) -> float:
    """Of the bytes that the job needs: one read of the logits, and one write for a gradient."""
    reads_only = case.direction == "forward" and case.provider != "copy"
    return (1 if reads_only else 2) * logits_bytes(case) / (1e6 * median_ms)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most over the runs."""
    return statistics.median(values), min(values), max(values)


def _key(case: dict[str, Any]) -> Case:
    fields = {name: case[name] for name in Case._fields if name in case}
    return Case(**{**fields, "shape": tuple(case["shape"])})


def _merge(runs: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A case that a run has timed in several passes has the median over them."""
    merged: dict[Case, dict[str, Any]] = {}
    for run in runs:
        passes: dict[Case, list[dict[str, Any]]] = {}
        for case in run:
            passes.setdefault(_key(case), []).append(case)
        for key, timed in passes.items():
            known = merged.setdefault(key, {**timed[0], **{name: [] for name in SERIES}})
            known["rounds"].append(sum(case["rounds"] for case in timed))
            for name in TIMES:
                known[name].append(statistics.median(case[name] for case in timed))
    return list(merged.values())


def _case(benchmark: dict[str, Any]) -> dict[str, Any]:
    stats = benchmark["stats"]
    return {
        **benchmark["extra_info"],
        "rounds": stats["rounds"],
        **{f"{name}_ms": round(1e3 * stats[name], 5) for name in ("median", "q1", "q3")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
