"""The GPU tests of the suite: collected on any machine, run in many small processes."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

from support.bare_checkout import bare_checkout
from wmtp.benchmarks import gpu_tests
from wmtp.benchmarks.gpu_tests import outcomes, run_tests, split

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
    monkeypatch.setattr(gpu_tests, "MOST_TESTS", 2)
    listed = (
        "a.py::x[1]\na.py::x[2 3]\na.py::y\nb.py::z\nSKIPPED [1] c.py:0: no\n4 tests collected\n"
    )
    assert split(listed) == [["a.py::x[1]", "a.py::x[2 3]"], ["a.py::y"], ["b.py::z"]]


def test_the_slowest_files_begin_first():
    slow = [f"tests/{name}.py::x" for name in reversed(gpu_tests.SLOWEST)]
    listed = "\n".join(["tests/test_a.py::x", *slow, "tests/test_z.py::x"])
    order = [part[0].split("::")[0] for part in split(listed)]
    names = [*gpu_tests.SLOWEST, "test_a", "test_z"]
    assert order == [f"tests/{name}.py" for name in names]
    folder = Path(__file__).parent
    assert all((folder / f"{name}.py").exists() for name in gpu_tests.SLOWEST)


def test_outcomes_are_read_from_the_last_line():
    text = "..F\n3 passed, as it were\n1 failed, 10 passed, 2 skipped, 1 error in 3.21s\n"
    assert outcomes(text) == Counter(passed=10, skipped=2, failed=1, error=1)
    assert outcomes("") == Counter()


def test_a_test_that_dies_or_hangs_costs_its_process_alone(monkeypatch, tmp_path):
    (tmp_path / "test_a.py").write_text(A_FILE)
    command = [*gpu_tests.PYTEST, f"--rootdir={tmp_path}"]
    monkeypatch.setattr(gpu_tests, "PYTEST", command)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(gpu_tests, "MOST_TESTS", 2)
    monkeypatch.setattr(gpu_tests, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu_tests, "split", lambda listed: split(with_folder(listed, tmp_path)))
    output = tmp_path / "pytest.txt"
    passed, told = run_tests(str(tmp_path), 6.0, output, 3)
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
    passed, told = run_tests(str(tmp_path), 30.0, tmp_path / "pytest.txt", 1)
    assert (passed, told) == (False, "not collected (exit status 2), see pytest.txt")
    assert "nothing_of_that_name" in (tmp_path / "pytest.txt").read_text()


NEED_MORE = {"test_cli.py": "typer.testing", "test_trainers.py": "hypothesis"}


def test_the_kernels_tests_are_collected_where_nothing_is_installed(tmp_path):
    """No file that seems to have tests for a GPU is skipped, as those are that need more."""
    checkout, python, environment = bare_checkout(tmp_path)
    of_gpu = r"@pytest\.mark\.gpu|^def test\w*\([^)]*\b(target|device)\b"
    files = {
        file.name
        for file in (checkout / "tests").glob("test_*.py")
        if re.search(of_gpu, file.read_text(), re.M)
    }
    command = [*python, "-m", "pytest", "-p", "hidden", *gpu_tests.PYTEST[3:], "--collect-only"]
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
