"""Runs the suite, reads its JSON, and puts every time beside eager torch and the copy."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import wmtp
import wmtp.cpu

BENCH = Path(__file__).with_name("bench_loss.py")


def run_suite(quick: bool) -> dict[str, Any]:
    """Time everything in a process of its own; environment and results, ready for JSON.

    Raises:
        RuntimeError: the suite failed (outputs that disagree, for one); carries its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", str(BENCH), "-p", "no:cacheprovider"),
                f"--benchmark-json={file}",
            ],
            env={**os.environ, "WMTP_BENCH_QUICK": str(int(quick))},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the benchmark suite failed:\n{done.stdout}{done.stderr}")
        measured = json.loads(file.read_text())
    return {
        "command": "wmtp bench --quick" if quick else "wmtp bench",
        "environment": environment(measured["machine_info"]["cpu"].get("brand_raw", "")),
        "cases": [_case(benchmark) for benchmark in measured["benchmarks"]],
    }


def environment(cpu: str) -> dict[str, Any]:
    """What a reader needs to know to repeat the numbers."""
    return {
        "cpu": cpu,
        "instruction_set": None if wmtp.cpu.unavailable() else wmtp.cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wmtp": wmtp.__version__,
    }


def _case(benchmark: dict[str, Any]) -> dict[str, Any]:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    return {
        **{name: info[name] for name in ("shape", "dtype", "provider", "peak_bytes")},
        "rounds": stats["rounds"],
        **{f"{name}_ms": round(1e3 * stats[name], 4) for name in ("median", "q1", "q3")},
    }


def table(results: dict[str, Any]) -> Table:
    """Median, ratio to eager and to the copy, and peak bytes in units of the logits."""
    known = {name: value for name, value in results["environment"].items() if value is not None}
    caption = ", ".join(f"{name} {value}" for name, value in known.items())
    rows = Table(title="loss + gradient", caption=caption, box=box.SIMPLE)
    for column in ("shape", "dtype", "provider", "median", "eager /", "/ copy", "peak"):
        text = column in ("dtype", "provider")
        rows.add_column(column, justify="left" if text else "right", no_wrap=True)
    groups: dict[tuple, dict[str, dict]] = {}
    for case in results["cases"]:
        key = (tuple(case["shape"]), case["dtype"])
        groups.setdefault(key, {})[case["provider"]] = case
    for (shape, dtype), cases in groups.items():
        logits_bytes = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        for provider, case in sorted(cases.items(), key=lambda item: -item[1]["median_ms"]):
            median = case["median_ms"]
            rows.add_row(
                "x".join(map(str, shape)),
                dtype,
                provider,
                f"{median:.2f} ms",
                f"{cases['eager']['median_ms'] / median:.2f}x",
                f"{median / cases['copy']['median_ms']:.2f}x",
                f"{case['peak_bytes'] / logits_bytes:.3f}",
            )
        rows.add_section()
    return rows
