"""The GPU suite where there is no GPU: what it would run, and how it goes from step to step."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from support.bare_checkout import bare_checkout
from support.gpu_cases import speed_case
from wmtp.benchmarks import gpu
from wmtp.benchmarks.gpu_cases import all_cases
from wmtp.benchmarks.gpu_processes import read_records
from wmtp.benchmarks.gpu_worker import new_record, parts


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(process, folder) of `make gpu` in a checkout that is not installed, without a device."""
    checkout, python, environment = bare_checkout(tmp_path_factory.mktemp("bare"))
    done = subprocess.run(
        ["make", "--silent", "gpu", f"PYTHON={' '.join(python)}", "OUT=new"],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    return done, checkout


def test_dry_run_says_what_it_would_run(dry_run):
    done, _ = dry_run
    assert (done.returncode, done.stderr) == (0, "")
    *plan, last = done.stdout.splitlines()
    assert last == "no CUDA device"
    assert [line.split()[0] for line in plan[: len(gpu.LIMITS)]] == list(gpu.LIMITS)
    limit = gpu.LIMITS["speed"]
    assert f"{len(all_cases()['speed'])} cases, at most {limit} s" in done.stdout


def test_a_checkout_that_is_not_installed_gets_two_links_and_nothing_else(dry_run):
    _, checkout = dry_run
    links = {
        path.name: os.readlink(path) for path in (checkout / "wmtp").iterdir() if path.is_symlink()
    }
    assert links == {"kernels": "../kernels/gpu", "benchmarks": "../benchmarks"}
    assert not (checkout / ".venv").exists()


def test_dry_run_writes_what_is_predicted_and_nothing_else(dry_run):
    out = dry_run[1] / "new"
    assert sorted(file.name for file in out.iterdir()) == ["predicted.json", "predicted.md"]
    results = json.loads((out / "predicted.json").read_text())
    assert {record["outcome"] for record in results["cases"]} == {"predicted"}
    assert not any("median_ms" in record for record in results["cases"])
    assert {step["outcome"] for step in results["steps"]} == {"not run"}
    rows = [line for line in (out / "predicted.md").read_text().splitlines() if "fused" in line]
    assert len(rows) > 80
    assert all(row.endswith(" *predicted* |") for row in rows)


def test_dry_run_without_a_folder_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.endswith("no CUDA device\n")
    assert not list(tmp_path.iterdir())


def test_all_steps_stay_under_eight_minutes():
    assert sum(gpu.LIMITS.values()) < 8 * 60


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "outcome"), [(0, "ok"), (1, "failed")])
def test_each_sanitizer_is_asked_for_one_call(monkeypatch, tmp_path, status, outcome):
    commands = []

    def run(command, *rest):
        commands.append(command)
        return status

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    steps = gpu.Suite({}, tmp_path).sanitizer(80.0)
    assert [(step.name, step.outcome) for step in steps] == [
        ("memcheck", outcome),
        ("racecheck", outcome),
    ]
    assert [command[:3] for command in commands] == [
        ["/bin/compute-sanitizer", "--tool", "memcheck"],
        ["/bin/compute-sanitizer", "--tool", "racecheck"],
    ]
    assert all(command[-1] == "one-call" for command in commands)


RESULTS = {"command": "c", "environment": {}, "absent": {}}
EVERY_STEP = dict.fromkeys(gpu.LIMITS, "ok") | {"sanitizer": "absent", "picture": "absent"}


@pytest.fixture
def steps_without_processes(monkeypatch):
    """Nothing is started; `found` says what each step is told."""
    found = {"tests": True, "speed": "ok", "compile": "ok"}

    def run_in_processes(command, file, cases, seconds, records):
        record = new_record(cases[0], found.get(file.stem, "not run"), "reason")
        record |= {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "peak_bytes": 0}
        file.write_text("")
        records += [record, *(new_record(case, "not run") for case in cases[1:])]

    def compile_in_processes(seconds):
        return [new_record(speed_case(), found["compile"], "reason")]

    monkeypatch.setattr(gpu, "run", lambda command, seconds, *rest: 0)
    monkeypatch.setattr(gpu, "run_in_processes", run_in_processes)
    monkeypatch.setattr(gpu, "compile_in_processes", compile_in_processes)
    monkeypatch.setattr(gpu, "call_in_processes", lambda seconds: [])
    monkeypatch.setattr(gpu, "run_tests", lambda *rest: (found["tests"], "told"))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.signal, "signal", lambda *rest: None)
    return found


def outcomes(folder):
    written = json.loads((folder / "gpu.json").read_text())
    return {step["name"]: step["outcome"] for step in written["steps"]}


@pytest.mark.parametrize(
    ("failing", "how", "status"),
    [("", "", 0), ("tests", False, 1), ("speed", "failed", 1), ("compile", "failed", 1)],
)
def test_a_failed_step_stops_no_other_and_makes_the_status_1(
    steps_without_processes, tmp_path, failing, how, status
):
    steps_without_processes |= {failing: how}
    assert gpu.settle(RESULTS, tmp_path) == status
    assert outcomes(tmp_path) == {**EVERY_STEP, **({failing: "failed"} if failing else {})}
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert len(written["cases"]) == sum(map(len, all_cases().values()))
    assert ("## Not compiled" in (tmp_path / "gpu.md").read_text()) == (failing == "compile")
    assert not list(tmp_path.glob("*.jsonl"))


def test_steps_that_were_not_asked_for_are_left_out(steps_without_processes, tmp_path):
    assert gpu.settle(RESULTS, tmp_path, ("speed", "tests")) == 0
    not_run = dict.fromkeys(gpu.LIMITS, "not run") | {"picture": "absent"}
    assert outcomes(tmp_path) == not_run | {"speed": "ok", "tests": "ok"}
    assert "| compile | not run | not asked for |" in (tmp_path / "gpu.md").read_text()


def test_steps_by_name(capsys):
    assert [line.split()[0] for line in gpu.plan(("tests", "compile"))] == ["compile", "tests"]
    with pytest.raises(SystemExit):
        gpu.main(["--steps", "tests,speeds"])
    assert "no step 'speeds': compile, tests" in capsys.readouterr().err


def test_what_breaks_in_the_suite_itself_costs_one_step(
    monkeypatch, steps_without_processes, tmp_path
):
    def break_down(*rest):
        raise OSError("no space left")

    monkeypatch.setattr(gpu, "run_tests", break_down)
    assert gpu.settle(RESULTS, tmp_path) == 1
    assert outcomes(tmp_path) == {**EVERY_STEP, "tests": "failed"}
    assert "| OSError: no space left |" in (tmp_path / "gpu.md").read_text()


def test_results_are_written_after_every_step(monkeypatch, steps_without_processes, tmp_path):
    seen = {}
    whole_write = gpu.write

    def write(results, folder, name):
        whole_write(results, folder, name)
        seen[len(seen)] = (outcomes(folder), len(results["cases"]))

    monkeypatch.setattr(gpu, "write", write)
    gpu.settle(RESULTS, tmp_path)
    counts = {name: len(cases) for name, cases in all_cases().items()}
    assert len(seen) == len(gpu.LIMITS) + 1  # and the picture
    for number, name in enumerate(gpu.LIMITS):
        steps, cases = seen[number]
        done = list(gpu.LIMITS)[: number + 1]
        assert steps == {
            other: EVERY_STEP[other] if other in done else "not run" for other in gpu.LIMITS
        }, name
        assert cases == sum(counts.get(other, 0) for other in done)


SUITE = """
import sys, torch
from pathlib import Path
from wmtp.benchmarks import gpu
out = Path(sys.argv[1])
gpu.WORKER = (sys.executable, str(out / "worker.py"))
gpu.run_tests = lambda *rest: (True, "told")
gpu.call_in_processes = lambda *rest: []
gpu.shutil.which = lambda name: None
results = {"command": "c", "environment": {}, "absent": {}}
sys.exit(gpu.settle(results, out))
"""
# All of speed, one case of others, no compiler; the step that hangs leaves its process's number.
HANGING = """
import json, os, sys, time
name, file = sys.argv[1], sys.argv[sys.argv.index("--records") + 1]
record = {"study": name, "shape": [1, 8, 2, 50], "dtype": "bfloat16", "direction": "forward",
          "provider": "fused", "weighting": "given", "dim": 0, "tier": "online",
          "outcome": "ok", "why": "", "median_ms": 1.5, "p20_ms": 1.0, "p80_ms": 2.0,
          "peak_bytes": 0}
if "compile" not in name:
    with open(file, "a") as stream:
        stream.write((json.dumps(record) + "\\n") * (ALL if name == "speed" else 1) + "{")
if name == HANGS:
    open(sys.argv[0] + ".numbers", "a").write(f"{os.getpid()}\\n")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("step", "how", "measured"),
    [
        ("linear", signal.SIGTERM, 1),
        ("linear", signal.SIGKILL, 0),
        ("compile", signal.SIGTERM, 0),  # several processes at once
    ],
)
def test_a_suite_that_is_killed_leaves_what_it_has_measured(tmp_path, step, how, measured):
    speed = len(all_cases()["speed"])
    worker = HANGING.replace("HANGS", repr(step)).replace("ALL", str(speed))
    (tmp_path / "worker.py").write_text(worker)
    suite = subprocess.Popen(
        [sys.executable, "-c", SUITE, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    numbers = tmp_path / "worker.py.numbers"
    wait_for(lambda: numbers.exists() and numbers.read_text())
    suite.send_signal(how)
    suite.wait(30)
    workers = [int(line) for line in numbers.read_text().splitlines()]
    assert sum(record["outcome"] == "ok" for record in cases(tmp_path)) == measured + (
        speed if step == "linear" else 0
    )
    steps = outcomes(tmp_path)
    assert steps["speed"] == ("ok" if step == "linear" else "not run")
    assert steps["tiers"] == "not run"
    if how == signal.SIGKILL:  # nobody was there to write more, or to end the worker
        os.kill(workers[0], signal.SIGKILL)
        (kept,) = read_records(tmp_path / "linear.jsonl")
        assert (kept["outcome"], kept["median_ms"]) == ("ok", 1.5)
        return
    assert steps[step] == "failed"
    assert "interrupted" in (tmp_path / "gpu.md").read_text()
    for worker in workers:
        wait_for(lambda worker=worker: not is_alive(worker))


def cases(folder):
    return json.loads((folder / "gpu.json").read_text())["cases"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# --- compile -------------------------------------------------------------------------------------


def test_a_process_that_dies_in_the_compiler_costs_one_case(monkeypatch, tmp_path):
    """Two processes share four cases; whoever compiles the second dies, as Triton can."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "part, first = value('--part'), int(value('--first'))\n"
        "for number in range(first, 2):\n"
        "    if (part, number) == ('0/2', 1): os.abort()\n"
        "    record = json.dumps({'outcome': 'ok', 'why': ''})\n"
        "    open(value('--records'), 'a').write(record + '\\n')\n"
    )
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(gpu, "processes", lambda: 2)
    cases = [speed_case(shape=(1, 8, 2, vocabulary)) for vocabulary in (40, 30, 20, 10)]
    monkeypatch.setattr(gpu, "all_cases", lambda: {"speed": cases, "linear": [], "tiers": []})
    found = gpu.compile_in_processes(30.0)
    assert [record["outcome"] for record in found] == ["ok", "failed", "ok", "ok"]
    assert found[1]["shape"] == [1, 8, 2, 20]
    assert found[1]["why"] == "its process ended with status -6"


def test_a_call_that_fails_is_told(monkeypatch):
    code = "import sys; number = sys.argv[-1]; print('bad ' + number); sys.exit(number == '1/9')"
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, "-c", code))
    found = gpu.call_in_processes(30.0)
    assert [record["outcome"] for record in found] == ["ok", "failed", *["ok"] * 7]
    assert found[1]["why"] == "exit status 1: bad 1/9"


def test_the_suites_workers_compile_their_share(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gpu, "run_cases", lambda *arguments: asked.append(arguments) or 0)
    options = ["--first", "3", "--seconds", "9", "--records", str(tmp_path / "r"), "--part", "1/4"]
    assert gpu.main(["--worker", "compile", *options]) == 0
    cases = [one for cases in all_cases().values() for one in cases]
    mine, first, seconds, records, *_ = asked.pop()
    assert (mine, first, seconds, records) == (parts(cases, 4)[1], 3, 9.0, tmp_path / "r")
