"""Kills, full disks and damaged files at random moments: no run is lost, no number is different.

WMTP_FAULTS: how many over the three algorithms. WMTP_FAULTS_SEED: others.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys

import pytest

import tiny_runs
from tiny_runs import ALGORITHMS, SMALL, read_metrics
from wmtp.trainers import RunFolder, TrainConfig

FAULTS = int(os.environ.get("WMTP_FAULTS", "6"))
SEED = os.environ.get("WMTP_FAULTS_SEED", "0")
FINISHED, REFUSED = 0, 3
LONGEST = 0.6  # seconds until a kill by the clock


# ---- what happens to a process ----


def _run(algo, corpus, out, errors, arm):
    """`wmtp train --resume` in a process of its own, with what `arm` lets happen to it."""
    import typer

    from wmtp.cli.console import errors_shown
    from wmtp.cli.train import train_run

    tiny_runs.torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    config, data = TrainConfig(algo=algo, **SMALL), tiny_runs.prepare(corpus)
    arm(out)
    try:
        with errors_shown():
            train_run(config, data, RunFolder(out), resume=True)
    except typer.Exit:
        sys.exit(REFUSED)


def nothing(_out):
    """Happens."""


class KilledAtFile:
    """kill -9 before the n-th time that a file or folder of the run is touched."""

    def __init__(self, rng):
        self.count = rng.randrange(1, 150)

    def __call__(self, out):
        def watch(event, arguments):
            if event.partition(".")[0] not in ("open", "os", "shutil"):
                return
            if arguments and str(out) in str(arguments[0]):
                self.count -= 1
                if self.count == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


class KilledAfterSteps:
    """kill -9 in the middle of a line of the metrics."""

    def __init__(self, rng):
        self.count = rng.randrange(1, 5)

    def __call__(self, out):
        append = RunFolder.append_metrics

        def die_at_last(folder, record):
            self.count -= 1
            if self.count == 0:
                with open(folder.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(record)[:20])
                os.kill(os.getpid(), signal.SIGKILL)
            append(folder, record)

        RunFolder.append_metrics = die_at_last


class KilledByClock:
    """At any moment, without a word to Python."""

    def __init__(self, rng):
        self.seconds = rng.uniform(0.001, LONGEST)

    def __call__(self, out):
        signal.setitimer(signal.ITIMER_REAL, self.seconds)


class DiskFull:
    """No file can be longer than some bytes."""

    def __init__(self, rng):
        self.bytes = int(1500 * 10 ** rng.uniform(0, 2.2))

    def __call__(self, out):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))


# ---- what happens to its files afterwards ----


def _newest(run):
    """The newest checkpoint of the run, or of its reference's."""
    folders = [
        folder for folder in (run, run / "reference") if RunFolder(folder).checkpoints.steps()
    ]
    if not folders:
        return None
    checkpoints = RunFolder(folders[0]).checkpoints
    return checkpoints.path / f"step-{checkpoints.steps()[-1]}"


def damage_a_file_of_the_newest_checkpoint(run, rng):
    checkpoint = _newest(run)
    if checkpoint is None:
        return
    file = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    how = rng.choice(("truncate", "empty", "flip", "delete", "garbage"))
    if how == "delete":
        file.unlink()
    elif how == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    else:
        kept = {"truncate": rng.randrange(len(content) + 1), "garbage": 0}.get(how, 0)
        file.write_bytes(content[:kept] + b"\0garbage" * (how == "garbage"))


def lengthen_the_metrics(run, rng):
    file = run / "metrics.jsonl"
    if file.exists():
        last = file.read_bytes().split(b"\n")[-2:][0]
        tail = rng.choice((b"\0" * 300, b"garbage\n", b'{"step": 1', last + b"\n"))
        file.write_bytes(file.read_bytes() + tail)


def cut_the_metrics(run, rng):
    file = run / "metrics.jsonl"
    if file.exists():
        os.truncate(file, rng.randrange(file.stat().st_size + 1))


def cut_the_settings(run, rng):
    file = run / "config.json"
    if file.exists():
        os.truncate(file, rng.randrange(file.stat().st_size))


def put_other_things_there(run, rng):
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "step-99").mkdir(exist_ok=True)
    (checkpoints / "step-7.tmp").mkdir(exist_ok=True)
    newest = _newest(run)
    if newest is not None and newest.name != "step-99":
        shutil.copytree(newest, newest.with_name(newest.name + "-keep"), dirs_exist_ok=True)
    (run / "result.json.tmp").write_text("{")
    (run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))


PROCESSES = (KilledAtFile, KilledAfterSteps, KilledByClock, DiskFull)
DAMAGES = (
    *(damage_a_file_of_the_newest_checkpoint, damage_a_file_of_the_newest_checkpoint),
    *(lengthen_the_metrics, cut_the_metrics, cut_the_settings, put_other_things_there),
)


class Run:
    """One that faults happen to, and what came of them."""

    def __init__(self, algo, corpus, folder, rng):
        self.algo, self.corpus, self.rng = algo, corpus, rng
        self.out, self.errors = folder / "run", folder / "errors.txt"
        self.copy = folder / "copy"
        self.told = []

    def start(self, arm=nothing):
        process = tiny_runs.fork_server().Process(
            target=_run, args=(self.algo, self.corpus, self.out, self.errors, arm)
        )
        process.start()
        process.join(timeout=120)
        return process.exitcode

    def fault_of_a_process(self):
        fault = self.rng.choice(PROCESSES)(self.rng)
        status = self.start(fault)
        self.told.append(f"{type(fault).__name__} {vars(fault)}: {status}")
        if status == REFUSED:
            self.assert_said_in_one_line("cannot write" if isinstance(fault, DiskFull) else "")
        else:
            assert status in (FINISHED, -signal.SIGKILL, -signal.SIGALRM), self.report()
        return status == FINISHED

    def fault_of_files(self):
        shutil.rmtree(self.copy, ignore_errors=True)
        if self.out.exists():
            shutil.copytree(self.out, self.copy)
        damage = self.rng.choice(DAMAGES)
        self.out.mkdir(exist_ok=True)
        damage(self.out, self.rng)
        status = self.start(KilledAfterSteps(self.rng))
        self.told.append(f"{damage.__name__}: {status}")
        if status == REFUSED:  # said, and mended by what is restored
            self.assert_said_in_one_line(str(self.out))
            shutil.rmtree(self.out)
            if self.copy.exists():
                shutil.copytree(self.copy, self.out)
        else:
            assert status in (FINISHED, -signal.SIGKILL), self.report()
        return status == FINISHED

    def assert_said_in_one_line(self, words):
        lines = [line for line in self.errors.read_text().splitlines() if "going on" not in line]
        assert len(lines) == 1, self.report()
        assert lines[0].startswith("error: "), self.report()
        assert words in lines[0], self.report()

    def report(self):
        said = self.errors.read_text() if self.errors.exists() else ""
        return f"seed {SEED}: " + "; ".join(self.told) + f"\n{said}"

    def assert_is(self, whole):
        for part in ("", "reference") if self.algo == "rho1-wmtp" else ("",):
            one, other = whole / part, self.out / part
            assert read_metrics(one) == read_metrics(other), self.report()
            results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
            for name in ("start", "end"):
                assert results[0][name] == results[1][name], self.report()
            weights = [(run / "final/model.safetensors").read_bytes() for run in (one, other)]
            assert weights[0] == weights[1], self.report()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_faults_at_random_moments_change_nothing(algo, corpus, tmp_path):
    rng = random.Random(f"{SEED} {algo}")
    whole = Run(algo, corpus, tmp_path / "whole", rng)
    whole.out.parent.mkdir()
    assert whole.start() == FINISHED, whole.report()
    run = Run(algo, corpus, tmp_path / "faulty", rng)
    run.out.parent.mkdir()
    for _ in range(FAULTS // len(ALGORITHMS)):
        happen = rng.choice((run.fault_of_a_process, run.fault_of_a_process, run.fault_of_files))
        if happen():  # the run was faster than the fault
            run.assert_is(whole.out)
            shutil.rmtree(run.out)
    assert run.start() == FINISHED, run.report()
    run.assert_is(whole.out)
    print(f"{algo}: {run.report()}")
