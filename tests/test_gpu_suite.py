"""The GPU suite where there is no GPU: what it would run, and how it runs its steps."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gpu_jobs import job
from wmtp.benchmarks import gpu, gpu_peers
from wmtp.benchmarks.gpu_cases import speed_jobs
from wmtp.benchmarks.gpu_worker import new_record


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(process, folder) of the whole command, which must not find a device."""
    out = tmp_path_factory.mktemp("gpu") / "new"
    hidden = "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'matplotlib']))\n"
    code = hidden + "from wmtp.benchmarks.gpu import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return done, out


def test_dry_run_says_what_it_would_run(dry_run):
    done, _ = dry_run
    assert (done.returncode, done.stderr) == (0, "")
    *plan, last = done.stdout.splitlines()
    assert last == "no CUDA device"
    assert [line.split()[0] for line in plan[: len(gpu.LIMITS)]] == list(gpu.LIMITS)
    assert f"{len(speed_jobs(gpu_peers.absent()))} cases, at most 170 s" in done.stdout
    assert "absent: cubins, no --cubins FOLDER was given" in plan


def test_dry_run_writes_what_is_predicted_and_nothing_else(dry_run):
    _, out = dry_run
    assert sorted(file.name for file in out.iterdir()) == ["predicted.json", "predicted.md"]
    results = json.loads((out / "predicted.json").read_text())
    assert {record["outcome"] for record in results["cases"]} == {"predicted"}
    assert not any("median_ms" in record for record in results["cases"])
    assert {step["outcome"] for step in results["steps"]} == {"not run"}
    rows = [line for line in (out / "predicted.md").read_text().splitlines() if "fused" in line]
    assert len(rows) > 200
    assert all(row.endswith(" *predicted* |") for row in rows)


def test_dry_run_without_a_folder_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.endswith("no CUDA device\n")
    assert not list(tmp_path.iterdir())


def test_all_steps_stay_under_eight_minutes():
    assert sum(gpu.LIMITS.values()) < 8 * 60


# --- processes ----------------------------------------------------------------------------------

JOBS = [job(dtype=dtype, direction=direction) for dtype in ("a", "b") for direction in ("x", "y")]


def worker(tmp_path, behaviour):
    """A stand-in for the process of a step: `behaviour` sees first, and says(record)."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "first, file = int(sys.argv[sys.argv.index('--first') + 1]), sys.argv[5]\n"
        "def say(outcome):\n"
        "    open(file, 'a').write(json.dumps({'outcome': outcome}) + '\\n')\n" + behaviour
    )
    return (sys.executable, str(script))


def outcomes(monkeypatch, tmp_path, behaviour, seconds=30.0):
    monkeypatch.setattr(gpu, "WORKER", worker(tmp_path, behaviour))
    return gpu.run_in_processes("speed", JOBS, seconds, None)


def test_a_process_that_dies_costs_one_job(monkeypatch, tmp_path):
    behaviour = (
        "for number in range(first, 4):\n"
        "    if number == 1: os.abort()\n"  # as after an illegal access, without a word
        "    say('ok')\n"
    )
    found = outcomes(monkeypatch, tmp_path, behaviour)
    assert [record["outcome"] for record in found] == ["ok", "failed", "ok", "ok"]
    assert found[1]["why"] == "its process ended with status -6"
    assert (found[1]["dtype"], found[1]["direction"]) == ("a", "y")


def test_after_a_failure_another_process_goes_on(monkeypatch, tmp_path):
    behaviour = f"say('failed' if first == 0 else 'ok'); sys.exit({gpu.AGAIN} if first < 3 else 0)"
    found = outcomes(monkeypatch, tmp_path, behaviour)
    assert [record["outcome"] for record in found] == ["failed", "ok", "ok", "ok"]


@pytest.mark.parametrize("behaviour", ["say('ok'); time.sleep(60)", "say('ok'); sys.exit(0)"])
def test_what_there_was_no_time_for_is_listed(monkeypatch, tmp_path, behaviour):
    found = outcomes(monkeypatch, tmp_path, behaviour, seconds=1.0)
    assert [record["outcome"] for record in found] == ["ok", *["not run"] * 3]
    assert found[-1]["why"] == "out of time"


def test_a_cut_off_step_is_ended_and_its_output_kept(tmp_path):
    code = "print('begun', flush=True); import time; time.sleep(60)"
    file = tmp_path / "output.txt"
    assert gpu.run([sys.executable, "-c", code], 2.0, file) is None
    assert file.read_text() == "begun\n"
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == 3


def test_the_tests_run_in_several_processes_where_they_can(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda command, *rest: commands.append(command))
    for found in (None, object()):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=found: found)
        (step,) = gpu.Suite(tmp_path, None).tests(120.0)
    assert ["-n" in command for command in commands] == [False, True]
    assert (step.outcome, step.why) == ("failed", "cut off after 120 s, see pytest.txt")


@pytest.mark.parametrize(("status", "outcome"), [(0, "ok"), (1, "failed")])
def test_each_sanitizer_is_asked_for_one_call(monkeypatch, tmp_path, status, outcome):
    commands = []

    def run(command, *rest):
        commands.append(command)
        return status

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    steps = gpu.Suite(tmp_path, None).sanitizer(80.0)
    assert [(step.name, step.outcome) for step in steps] == [
        ("memcheck", outcome),
        ("racecheck", outcome),
    ]
    assert [command[:3] for command in commands] == [
        ["/bin/compute-sanitizer", "--tool", "memcheck"],
        ["/bin/compute-sanitizer", "--tool", "racecheck"],
    ]
    assert all(command[-1] == "one-call" for command in commands)


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("tests", 1), ("speed", 1)])
def test_a_failed_step_stops_no_other_and_makes_the_status_1(
    monkeypatch, tmp_path, failing, status
):
    def run(command, seconds, *rest):
        return int(failing == "tests" and "pytest" in command)

    def run_in_processes(name, jobs, seconds, folder):
        outcome = "failed" if name == failing else "not run"
        return [new_record(case, outcome, "reason") for case in jobs[:2]]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "run_in_processes", run_in_processes)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    results = {"command": "c", "environment": {}, "absent": {}}
    assert gpu.settle(results, tmp_path, None) == status
    written = json.loads((tmp_path / "gpu.json").read_text())
    steps = {step["name"]: step["outcome"] for step in written["steps"]}
    expected = dict.fromkeys(("tests", "speed", "linear", "tiers", "snapshot"), "ok")
    expected |= {"sanitizer": "absent", "picture": "absent"}
    assert steps == {**expected, **({failing: "failed"} if failing else {})}
    assert len(written["cases"]) == 6
