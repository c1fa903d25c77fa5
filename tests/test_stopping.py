"""SIGTERM, SIGINT and SIGHUP lose nothing, in one process and in several."""

import os
import signal
import sys

import pytest

from support import tiny_runs
from support.command_line import SMALL, unwrapped, wmtp
from support.tiny_runs import in_processes, read_metrics
from wmtp.cli.stopping import own_command, stopping
from wmtp.trainers import BaseWmtpTrainer, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


def signal_after(monkeypatch, step, number):
    """To this process, in the middle of the step after it."""
    train_step = BaseWmtpTrainer.train_step

    def interrupted(self, batch):
        if self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self, batch)

    monkeypatch.setattr(BaseWmtpTrainer, "train_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number, corpus, tmp_path, monkeypatch
):
    def arguments(out):
        how = ["train", "--algo=critic-wmtp", *SMALL, "--data", str(corpus), "--out", str(out)]
        return [*how, "--save-every=100"]

    handler = signal.getsignal(number)
    assert wmtp(*arguments(tmp_path / "whole")).exit_code == 0
    with monkeypatch.context() as patched:
        signal_after(patched, 4, number)
        patched.setattr(sys, "argv", ["wmtp", *arguments(tmp_path / "out")])
        stopped = wmtp(*arguments(tmp_path / "out"))
    assert stopped.exit_code == 128 + number
    assert f"{number.name}: finishing the step and saving" in unwrapped(stopped.output)
    assert "stopped after step 5 of 8, continue with:" in stopped.output
    command = stopped.output.strip().splitlines()[-1].split()
    assert command == ["wmtp", *arguments(tmp_path / "out"), "--resume"]
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-5"]
    assert signal.getsignal(number) == handler
    assert wmtp(*command[1:]).exit_code == 0
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")


def test_a_stop_while_the_reference_is_trained(corpus, tmp_path, monkeypatch):
    how = ["train", "--algo=rho1-wmtp", *SMALL, "--data", corpus, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        signal_after(patched, 2, signal.SIGTERM)
        assert wmtp(*how).exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "out/reference/checkpoints/step-3").is_dir()
    assert wmtp(*how, "--resume").exit_code == 0


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _signalled_twice():
    from wmtp.cli.stopping import stopping

    with stopping() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")


def test_the_second_signal_stops_at_once():
    process = tiny_runs.fork_server().Process(target=_signalled_twice)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGTERM


def _train_and_signal_one(corpus, out):
    from wmtp.cli.stopping import stopping
    from wmtp.cli.train import train_run

    asked_once = []

    def stop_asked():
        asked_once.append(1)
        return os.environ["RANK"] == "1" and len(asked_once) == 3

    config = tiny_runs.TrainConfig(algo="mtp-baseline", **tiny_runs.SMALL)
    with stopping():
        train_run(
            config, tiny_runs.prepare(corpus), RunFolder(out), resume=False, stop_asked=stop_asked
        )


def test_one_of_two_processes_is_signalled_and_both_stop_at_the_same_step(corpus, tmp_path):
    statuses = in_processes(2, _train_and_signal_one, corpus, tmp_path / "out")
    assert statuses == [1, 1]  # outside a command, typer.Exit is an exception like others
    assert len(read_metrics(tmp_path / "out")) == 3
    assert (tmp_path / "out/checkpoints/step-3/digests.json").is_file()


def test_the_command_that_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/wmtp", "train", "--out", "a b", "--resume"])
    assert own_command("--resume") == "wmtp train --out 'a b' --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_command().startswith("torchrun --nproc-per-node=2 -m wmtp train")
