"""The processes of the GPU suite: one that dies or hangs costs what it was at."""

import os
import sys

import pytest

from wmtp.benchmarks import gpu_processes
from wmtp.benchmarks.gpu_processes import AGAIN, in_parallel, read_records, run

JOBS = 4


@pytest.fixture
def outcomes(tmp_path):
    """What is written of JOBS jobs by a worker whose code sees `first` and says(outcome)."""

    def outcomes(behaviour, seconds=30.0):
        script, file = tmp_path / "worker.py", tmp_path / "records.jsonl"
        script.write_text(
            "import json, os, sys, time\n"
            "first, file = int(sys.argv[sys.argv.index('--first') + 1]), sys.argv[4]\n"
            "def say(outcome):\n"
            "    open(file, 'a').write(json.dumps({'outcome': outcome}) + '\\n')\n" + behaviour
        )

        def failed(number, why):
            return {"outcome": "failed", "number": number, "why": why}

        command = [sys.executable, str(script)]
        why = gpu_processes.run_jobs_in_processes(command, file, JOBS, seconds, failed)
        found = read_records(file)
        return found + [{"outcome": why}] * (len(found) < JOBS)

    return outcomes


def said(records):
    return [record["outcome"] for record in records]


def test_a_process_that_dies_costs_one_job(outcomes):
    found = outcomes(
        "for number in range(first, 4):\n"
        "    if number == 1: os.abort()\n"  # as after an illegal access, without a word
        "    say('ok')\n"
    )
    assert said(found) == ["ok", "failed", "ok", "ok"]
    assert found[1] | {"number": 1, "why": "its process ended with status -6"} == found[1]


def test_half_a_line_of_a_process_that_died_is_no_record(outcomes):
    found = outcomes("if first == 0: open(file, 'a').write('{\"outc'), os.abort()\nsay('ok')")
    assert said(found) == ["failed", "ok", "out of time"]


def test_after_a_failure_another_process_goes_on(outcomes):
    found = outcomes(
        f"say('failed' if first == 0 else 'ok'); sys.exit({AGAIN} if first < 3 else 0)"
    )
    assert said(found) == ["failed", "ok", "ok", "ok"]


@pytest.mark.parametrize("behaviour", ["say('ok'); time.sleep(60)", "say('ok'); sys.exit(0)"])
def test_a_process_without_time_is_the_last(outcomes, behaviour):
    assert said(outcomes(behaviour, seconds=1.0)) == ["ok", "out of time"]


def test_processes_that_all_die_at_once_do_not_use_up_the_time(outcomes):
    *failed, why = said(outcomes("sys.exit(1)"))
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
