"""Runs the suites of bench.py, gathers what they measured, and says where."""

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
from wmtp.benchmarks.problem import Case, Record, case_of
from wmtp.benchmarks.providers import LINEAR, LOGITS, UNCOMPILED, absent

SUITES = ("loss", "scaling", "options", "linear")
OF_LOGITS = ("loss", "scaling")
# Measured anew in each run, so one value a run.
TIMES = ("median_ms", "q1_ms", "q3_ms")
PACKAGES = ("torch", "cut-cross-entropy", "pytest-benchmark")
GPU_PACKAGES = ("triton", "liger-kernel", "quack-kernels", "flash-attn", "cuda-bindings")


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
    tests = [f"{Path(__file__).with_name('bench.py')}::test_{suite}" for suite in suites]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        arguments = ["-x", "-vv", *tests, "-p", "no:cacheprovider", f"--benchmark-json={file}"]
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


def gather(command: str, size: str, runs: list[Record]) -> dict[str, Any]:
    """Environment and the results of all runs, ready for JSON."""
    cases = _merge([_record(benchmark) for benchmark in run["benchmarks"]] for run in runs)
    studies = {record["study"] for record in cases}
    contestants = (
        {} if studies <= {"options", "rules"} else LINEAR if "linear" in studies else LOGITS
    )
    missing = absent(contestants, compiling=size == "full")
    return {
        "command": command,
        "environment": environment(runs[0]["machine_info"]["cpu"].get("brand_raw", "")),
        "absent": {name: why for name, why in missing.items() if name not in UNCOMPILED},
        "cases": cases,
    }


def environment(processor: str) -> dict[str, Any]:
    """What a reader needs to know to repeat the numbers."""
    return {
        "cpu": processor,
        "instruction_set": None if cpu.unavailable() else cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions(PACKAGES),
        "wmtp": wmtp.__version__,
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in found:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cases_by_key(results: dict[str, Any]) -> dict[Case, Record]:
    """The results of `gather`, or of its JSON, by what identifies them."""
    return {case_of(record): record for record in results["cases"]}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most over the runs."""
    return statistics.median(values), min(values), max(values)


def _merge(runs: Iterable[list[Record]]) -> list[Record]:
    """A case that a run has timed in several passes has the median over them."""
    merged: dict[Case, Record] = {}
    for run in runs:
        passes: dict[Case, list[Record]] = {}
        for record in run:
            passes.setdefault(case_of(record), []).append(record)
        for case, timed in passes.items():
            series: dict[str, Any] = {name: [] for name in ("rounds", *TIMES)}
            known = merged.setdefault(case, {**timed[0], **series})
            known["rounds"].append(sum(record["rounds"] for record in timed))
            for name in TIMES:
                known[name].append(statistics.median(record[name] for record in timed))
    return list(merged.values())


def _record(benchmark: dict[str, Any]) -> Record:
    stats = benchmark["stats"]
    return {
        **benchmark["extra_info"],
        "rounds": stats["rounds"],
        **{f"{name}_ms": round(1e3 * stats[name], 5) for name in ("median", "q1", "q3")},
    }
