"""The processes of the GPU suite, tests among them: one that dies or hangs costs what it was at."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

from support.bare_checkout import bare_checkout
from support.gpu_cases import speed_case
from wmtp.benchmarks import gpu_processes
from wmtp.benchmarks.gpu_processes import AGAIN, in_parallel, outcomes, run, run_tests, split


@pytest.fixture
def worked(tmp_path):
    """What is written of four cases by a worker whose code sees `first` and says(outcome)."""

    def work(behaviour, seconds=30.0):
        script, file = tmp_path / "worker.py", tmp_path / "records.jsonl"
        script.write_text(
            "import json, os, sys, time\n"
            "first, file = int(sys.argv[sys.argv.index('--first') + 1]), sys.argv[4]\n"
            "def say(outcome):\n"
            "    open(file, 'a').write(json.dumps({'outcome': outcome}) + '\\n')\n" + behaviour
        )

        found = []
        command = [sys.executable, str(script)]
        gpu_processes.run_in_processes(command, file, [speed_case()] * 4, seconds, found)
        assert len(found) == 4
        return found

    return work


def said(records):
    """Outcomes, and of the first that was not run why."""
    reasons = [record["why"] for record in records if record["outcome"] == "not run"]
    return [record["outcome"] for record in records][: 4 - len(reasons)] + reasons[:1]


def test_a_process_that_dies_costs_one_case(worked):
    found = worked(
        "for number in range(first, 4):\n"
        "    if number == 1: os.abort()\n"  # as after an illegal access, without a word
        "    say('ok')\n"
    )
    assert said(found) == ["ok", "failed", "ok", "ok"]
    assert found[1]["why"] == "its process ended with status -6"


def test_half_a_line_of_a_process_that_died_is_no_record(worked):
    found = worked("if first == 0: open(file, 'a').write('{\"outc'), os.abort()\nsay('ok')")
    assert said(found) == ["failed", "ok", "out of time"]


def test_after_a_failure_another_process_goes_on(worked):
    found = worked(f"say('failed' if first == 0 else 'ok'); sys.exit({AGAIN} if first < 3 else 0)")
    assert said(found) == ["failed", "ok", "ok", "ok"]


@pytest.mark.parametrize("behaviour", ["say('ok'); time.sleep(60)", "say('ok'); sys.exit(0)"])
def test_a_process_without_time_is_the_last(worked, behaviour):
    assert said(worked(behaviour, seconds=1.0)) == ["ok", "out of time"]


def test_processes_that_all_die_at_once_do_not_use_up_the_time(worked):
    *failed, why = said(worked("sys.exit(1)"))
    assert failed == ["failed"] * (gpu_processes.MOST_SILENT - 1)
    assert why == "3 processes in a row ended before their first record"


def test_a_cut_off_step_may_say_what_it_has_found_and_is_ended(tmp_path):
    file = tmp_path / "output.txt"
    code = "print('begun'); import time\ntry: time.sleep(60)\nfinally: print('found')"
    assert run([sys.executable, "-c", code], 2.0, file) is None
    assert file.read_text().splitlines()[:2] == ["begun", "found"]
    assert run([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == 3


def test_one_that_does_not_listen_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_processes, "GRACE", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('begun'); time.sleep(60)"
    )
    assert run([sys.executable, "-c", code], 1.0, tmp_path / "output.txt") is None


def test_it_stays_in_the_session_of_the_suite(tmp_path):
    """Whoever ends that session ends it too; in a group of its own it ends with its children."""
    code = "import os; print(os.getsid(0), os.getpgid(0) == os.getpid())"
    assert run([sys.executable, "-c", code], 30.0, tmp_path / "output.txt") == 0
    assert (tmp_path / "output.txt").read_text() == f"{os.getsid(0)} True\n"


def test_in_parallel_keeps_the_order():
    assert in_parallel(lambda number: number + 1, range(5), 3) == [1, 2, 3, 4, 5]


# --- tests ---------------------------------------------------------------------------------------

A_FILE = """
import os, signal, time, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert False
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
def test_unreached(): pass
def test_hangs(): time.sleep(60)
def test_after(): pass
"""


def test_split_by_file_and_number(monkeypatch):
    monkeypatch.setattr(gpu_processes, "MOST_TESTS", 2)
    listed = (
        "a.py::x[1]\na.py::x[2 3]\na.py::y\nb.py::z\nSKIPPED [1] c.py:0: no\n4 tests collected\n"
    )
    assert split(listed) == [["a.py::x[1]", "a.py::x[2 3]"], ["a.py::y"], ["b.py::z"]]


def test_the_slowest_files_begin_first():
    slow = [f"tests/{name}.py::x" for name in reversed(gpu_processes.SLOWEST)]
    listed = "\n".join(["tests/test_a.py::x", *slow, "tests/test_z.py::x"])
    order = [part[0].split("::")[0] for part in split(listed)]
    names = [*gpu_processes.SLOWEST, "test_a", "test_z"]
    assert order == [f"tests/{name}.py" for name in names]
    folder = Path(__file__).parent
    assert all((folder / f"{name}.py").exists() for name in gpu_processes.SLOWEST)


def test_outcomes_are_read_from_the_last_line():
    text = "..F\n3 passed, as it were\n1 failed, 10 passed, 2 skipped, 1 error in 3.21s\n"
    assert outcomes(text) == Counter(passed=10, skipped=2, failed=1, error=1)
    assert outcomes("") == Counter()


def test_a_test_that_dies_or_hangs_costs_its_process_alone(monkeypatch, tmp_path):
    (tmp_path / "test_a.py").write_text(A_FILE)
    command = [*gpu_processes.PYTEST, f"--rootdir={tmp_path}"]
    monkeypatch.setattr(gpu_processes, "PYTEST", command)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(gpu_processes, "MOST_TESTS", 2)
    monkeypatch.setattr(gpu_processes, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu_processes, "split", lambda listed: split(with_folder(listed, tmp_path)))
    monkeypatch.setattr(gpu_processes, "processes", lambda: 3)
    output = tmp_path / "pytest.txt"
    passed, told = run_tests(str(tmp_path), 6.0, output)
    assert not passed
    assert sorted(told.removesuffix(", see pytest.txt").split(", ")) == [
        "1 failed", "1 passed", "2 cut off", "2 lost with exit status -9",
    ]  # fmt: skip
    assert "def test_bad(): assert False" in output.read_text()
    assert "KeyboardInterrupt" in output.read_text()


def with_folder(listed, folder):
    return "".join(
        f"{folder}/{Path(line).name}\n" for line in listed.splitlines() if "test_a.py::" in line
    )


def test_what_cannot_be_collected_fails(tmp_path):
    (tmp_path / "test_a.py").write_text("import nothing_of_that_name\n")
    passed, told = run_tests(str(tmp_path), 30.0, tmp_path / "pytest.txt")
    assert (passed, told) == (False, "not collected (exit status 2), see pytest.txt")
    assert "nothing_of_that_name" in (tmp_path / "pytest.txt").read_text()


NEED_MORE = {"test_cli.py": "rich.console", "test_trainers.py": "hypothesis"}


def test_the_kernels_tests_are_collected_where_nothing_is_installed(tmp_path):
    """No file that seems to have tests for a GPU is skipped, as those are that need more."""
    checkout, python, environment = bare_checkout(tmp_path)
    of_gpu = r"@pytest\.mark\.gpu|^def test\w*\([^)]*\b(target|device)\b"
    files = {
        file.name
        for file in (checkout / "tests").glob("test_*.py")
        if re.search(of_gpu, file.read_text(), re.M)
    }
    command = [*python, "-m", "pytest", "-p", "hidden", *gpu_processes.PYTEST[3:], "--collect-only"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in sorted(files | set(NEED_MORE)))],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = Counter(Path(part[0].split("::")[0]).name for part in split(done.stdout))
    assert {"test_kernels.py", "test_kernels_tiers.py", "test_loss.py"} <= set(found)
    skipped = r"^SKIPPED \[\d\] tests/(\S+):0: (\S+) is not installed"
    assert dict(re.findall(skipped, done.stdout, re.M)) == NEED_MORE


@pytest.mark.parametrize(
    ("markers", "missing", "outcome"),
    [("gpu", "typer", "skipped"), ("gpu", "wmtp.kernels", "failed"), ("", "typer", "failed")],
)
def test_a_missing_package_is_an_error_in_the_whole_suite(markers, missing, outcome):
    error = pytest.Module.CollectError("told")
    error.__cause__ = ModuleNotFoundError("told", name=missing)
    call = SimpleNamespace(excinfo=SimpleNamespace(value=error))
    report = SimpleNamespace(failed=True, outcome="failed", call=call)
    config = SimpleNamespace(getoption=lambda name: markers)
    hook = conftest.pytest_make_collect_report(SimpleNamespace(config=config, path="test_x.py"))
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome
