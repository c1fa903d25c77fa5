"""The GPU tests in many small processes: one that dies, or hangs, costs the tests it was given."""

import itertools
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from wmtp.benchmarks.gpu_processes import in_parallel, run

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


def run_tests(folder: str, seconds: float, output: Path, processes: int) -> tuple[bool, str]:
    """Whether all passed, and what to say of it; what they print goes into the file."""
    deadline = time.monotonic() + seconds
    output.unlink(missing_ok=True)
    status, listed = _run([*PYTEST, "--collect-only", folder], seconds, output)
    if status != 0:
        return False, f"not collected (exit status {status}), see {output.name}"

    def run_part(tests: list[str]) -> Counter[str]:
        left = deadline - time.monotonic()
        if left < SHORTEST:
            return Counter({"not run": len(tests)})
        status, printed = _run([*PYTEST, *tests], left, output)
        found = outcomes(printed)
        if (lost := len(tests) - found.total()) > 0:
            found["cut off" if status is None else f"lost with exit status {status}"] = lost
        return found

    counts = sum(in_parallel(run_part, split(listed), processes), Counter[str]())
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


def _run(command: list[str], seconds: float, output: Path) -> tuple[int | None, str]:
    """Exit status, and what was printed; it is added to the output as a whole."""
    with tempfile.NamedTemporaryFile("r") as own:
        status = run(command, seconds, Path(own.name))
        printed = own.read()
    with output.open("a") as file:
        file.write(f"== {' '.join(command[len(PYTEST) :])}: exit status {status}\n{printed}\n")
    return status, printed
