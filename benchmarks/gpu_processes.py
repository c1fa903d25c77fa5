"""The processes that the GPU suite starts: each ends by itself, by its limit, or with the suite.

The GPU tests too run in many of them: one that dies, or hangs, costs the tests it was given.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from wmtp.benchmarks import ROOT
from wmtp.benchmarks.gpu_worker import AGAIN, new_record
from wmtp.benchmarks.problem import Case, Record

WORKER = (sys.executable, "-m", "wmtp.benchmarks.gpu", "--worker")
MOST_SILENT = 3  # processes in a row that ended without a record: the fault is not a case's
OUT_OF_TIME = "out of time"
MOST_PROCESSES = 16  # each has a CUDA context of its own
GRACE = 3.0  # seconds in which a process that is cut off may say what it has found
T = TypeVar("T")
R = TypeVar("R")

PYTEST = (
    *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs"),
    *("-o", "addopts=", "-p", "no:cacheprovider"),
)
# The files whose tests took a card longest: they are begun before all others.
SLOWEST = ("test_kernels_tiers", "test_weightings", "test_targets", "test_kernels_weights")
MOST_TESTS = 20  # of one file, in a process
SHORTEST = 5.0  # seconds: with less left no process begins
OUTCOMES = r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)\b"
GOOD = {"passed", "skipped", "xfailed"}

_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_ended = False


def processes() -> int:
    return min(os.cpu_count() or 1, MOST_PROCESSES)


def run(
    command: Iterable[str],
    seconds: float,
    output: Path | None = None,
    own: dict[str, str] | None = None,
) -> int | None:
    """The exit status, None where it was cut off; what it printed goes into the file, if any."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(output.open("w")) if output else None
        process = _start(list(command), stream, own or {})
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            _signal(process, signal.SIGKILL)  # compilers may outlive what began them
            process.wait()
            with _lock:
                _running.discard(process)


def in_parallel(function: Callable[[T], R], items: Iterable[T], processes: int) -> list[R]:
    """[function(item)], each of which waits for processes of its own; so many at a time."""
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except (KeyboardInterrupt, SystemExit):
            _end_all()
            raise


def run_in_processes(
    command: Iterable[str], file: Path, cases: list[Case], seconds: float, found: list[Record]
) -> None:
    """Find a record for each case, whatever happens to who writes them, or to this.

    Args:
        command: measures the cases from `--first` on, writes a line of JSON for each to the file,
            and ends with AGAIN where the rest needs a new process.
        found: the records are added to it.
    """
    why = "interrupted"
    file.write_text("")
    try:
        why = _run_until(command, file, cases, time.monotonic() + seconds)
    finally:
        records = read_records(file)
        found += records + [new_record(case, "not run", why) for case in cases[len(records) :]]


def _run_until(command: Iterable[str], file: Path, cases: list[Case], deadline: float) -> str:
    """Returns why the last cases have no record, if that is so."""
    silent = 0
    while (left := deadline - time.monotonic()) > 0:
        first = len(read_records(file))
        if first == len(cases):
            break
        arguments = ["--first", str(first), "--records", str(file), "--seconds", str(left)]
        status = run([*command, *arguments], left)
        if status in (0, None):  # all done, or out of time
            break
        done = len(read_records(file))
        silent = 0 if done > first else silent + 1
        if silent == MOST_SILENT:
            return f"{silent} processes in a row ended before their first record"
        if status != AGAIN and done < len(cases):
            why = f"its process ended with status {status}"
            with file.open("a") as stream:
                stream.write(json.dumps(new_record(cases[done], "failed", why)) + "\n")
    return OUT_OF_TIME


def read_records(file: Path) -> list[Record]:
    """Those whose line is whole; a part of one, whose process was killed, is cut off the file."""
    if not file.exists():
        return []
    whole, newline, rest = file.read_text().rpartition("\n")
    if rest:
        file.write_text(whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def _start(command: list[str], stream: Any, own: dict[str, str]) -> subprocess.Popen:
    with _lock:
        if _ended:
            raise RuntimeError("the suite was ended")
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT if stream else None, cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **own},
            process_group=0,  # no session: whoever ends the suite's session ends these as well
        )  # fmt: skip
        _running.add(process)
        return process


def _end_all() -> None:
    """Whatever runs, and nothing starts any more: the suite itself is ended."""
    global _ended
    with _lock:
        _ended = True
        for process in _running:
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


# --- tests ---------------------------------------------------------------------------------------


def run_tests(folder: str, seconds: float, output: Path) -> tuple[bool, str]:
    """Whether all passed, and what to say of it; what they print goes into the file."""
    deadline = time.monotonic() + seconds
    output.unlink(missing_ok=True)
    status, listed = _run_pytest([*PYTEST, "--collect-only", folder], seconds, output)
    if status != 0:
        return False, f"not collected (exit status {status}), see {output.name}"

    def run_part(tests: list[str]) -> Counter[str]:
        left = deadline - time.monotonic()
        if left < SHORTEST:
            return Counter({"not run": len(tests)})
        status, printed = _run_pytest([*PYTEST, *tests], left, output)
        found = outcomes(printed)
        if (lost := len(tests) - found.total()) > 0:
            found["cut off" if status is None else f"lost with exit status {status}"] = lost
        return found

    counts = sum(in_parallel(run_part, split(listed), processes()), Counter[str]())
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return set(counts) <= GOOD, f"{told or 'there are none'}, see {output.name}"


def split(listed: str) -> list[list[str]]:
    """The tests that pytest has collected, for processes that each get at most MOST_TESTS.

    Those of the slowest files come first: what starts last would else run alone.
    """
    tests = [line for line in listed.splitlines() if re.match(r"\S+\.py::", line)]
    files = [list(found) for _, found in itertools.groupby(tests, lambda test: test.split("::")[0])]
    files.sort(key=_place)
    return [
        file[first : first + MOST_TESTS]
        for file in files
        for first in range(0, len(file), MOST_TESTS)
    ]


def outcomes(printed: str) -> Counter[str]:
    """How many passed, failed and so on, by pytest's last line.

    >>> outcomes("F.\\n1 failed, 1 passed in 0.1s\\n")
    Counter({'failed': 1, 'passed': 1})
    """
    last = (printed.strip().splitlines() or [""])[-1]
    return Counter({outcome: int(count) for count, outcome in re.findall(OUTCOMES, last)})


def _place(tests: list[str]) -> int:
    name = Path(tests[0].split("::")[0]).stem
    return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


def _run_pytest(command: list[str], seconds: float, output: Path) -> tuple[int | None, str]:
    """Exit status, and what was printed; it is added to the output as a whole."""
    with tempfile.NamedTemporaryFile("r") as own:
        status = run(command, seconds, Path(own.name))
        printed = own.read()
    with output.open("a") as file:
        file.write(f"== {' '.join(command[len(PYTEST) :])}: exit status {status}\n{printed}\n")
    return status, printed
