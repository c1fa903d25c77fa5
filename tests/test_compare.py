"""`wmtp compare`: alike, once, and shown side by side."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from support.command_line import SMALL, unwrapped, wmtp
from wmtp.cli import compare as command
from wmtp.cli import plot
from wmtp.cli.child import run_child

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def children(monkeypatch):
    """Their command lines; run in this process instead of one each, which costs an import each."""
    found = []

    def run_here(arguments):
        found.append(arguments)
        return wmtp(*arguments).exit_code

    monkeypatch.setattr(command, "run_child", run_here)
    return found


def test_compare_trains_all_alike_once(corpus, tmp_path, children):
    arguments = ["compare", *SMALL, "--loss=fused", "--data", corpus, "--out", tmp_path / "runs"]
    first = wmtp(*arguments)
    assert first.exit_code == 0, first.output
    assert len(children) == 3
    assert all("--loss=fused" in child for child in children)
    results = json.loads((tmp_path / "runs/compare.json").read_text())
    assert list(results) == ["mtp-baseline", "critic-wmtp", "rho1-wmtp", "next-token"]
    starts = [result["start"] for name, result in results.items() if name != "next-token"]
    assert starts[0] == starts[1] == starts[2]
    for name, result in results.items():
        assert name in first.output
        assert result["peak_memory_bytes"] > 2**20
    (row,) = (line for line in first.output.splitlines() if line.startswith(" next-token "))
    head_0, accuracy, _, _ = row.split()[1:]
    assert head_0 == f"{results['next-token']['end']['ce_per_head'][0]:.3f}"
    assert accuracy.endswith("%")
    assert Image.open(tmp_path / "runs/compare.png").size == (1800, 990)

    records = (tmp_path / "runs/mtp-baseline/metrics.jsonl").read_text().splitlines()
    validated = [step for step, line in enumerate(records, 1) if "validation" in json.loads(line)]
    assert validated == [1, 2, 3, 4, 5, 6]  # a quarter of six steps is one

    assert wmtp(*arguments).exit_code == 0
    assert len(children) == 3  # nothing was trained again

    metrics = tmp_path / "runs/mtp-baseline/metrics.jsonl"
    whole = metrics.read_text()
    for damaged in (whole.replace('"stage"', '"scene"', 1), '{"step": 3}\n', ""):
        metrics.write_text(damaged)
        assert wmtp(*arguments).exit_code == 0
        assert metrics.read_text() == whole
    assert wmtp(*arguments, "--steps", 7).exit_code == 1


def test_a_reference_for_those_that_compare_with_one(corpus, tmp_path, children):
    how = [*SMALL, "--data", corpus]
    reference = tmp_path / "reference"
    assert (
        wmtp("train", "--algo=mtp-baseline", *how, "--horizon=1", "--out", reference).exit_code == 0
    )
    both = ["--algo=mtp-baseline", "--algo=rho1-wmtp", "--out", tmp_path / "runs"]
    result = wmtp("compare", *both, *how, "--ref", reference, "--eval-every=3")
    assert result.exit_code == 0, result.output
    assert [f"--ref={reference}" in child for child in children] == [False, True]
    assert all("--eval-every=3" in child for child in children)
    assert "next-token" not in result.output
    refused = wmtp("compare", "--algo=mtp-baseline", *how, "--ref", reference)
    assert refused.exit_code == 1
    assert "mtp-baseline compare with no reference model" in unwrapped(refused.output)


def test_results_that_cannot_be_written(corpus, tmp_path, children):
    how = ["compare", "--algo=mtp-baseline", *SMALL, "--data", corpus, "--out", tmp_path / "runs"]
    (tmp_path / "runs" / "compare.json.tmp").mkdir(parents=True)
    result = wmtp(*how)
    assert result.exit_code == 1
    assert "mtp-baseline" in result.output  # the table is not lost
    assert "cannot write" in unwrapped(result.output)
    (tmp_path / "runs" / "compare.json.tmp").rmdir()
    assert wmtp(*how).exit_code == 0
    assert len(children) == 1


def test_a_signal_reaches_the_child_once_and_the_command_ends_as_it_does(corpus, tmp_path):
    how = [*SMALL, "--steps=2000", "--data", str(corpus), "--out", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [sys.executable, "-m", "wmtp", "compare", "--algo=mtp-baseline", *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "runs/mtp-baseline/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "compare itself goes on with:\n  wmtp compare --algo=mtp-baseline" in output
    assert list((tmp_path / "runs/mtp-baseline/checkpoints").glob("step-*"))


def test_a_child_that_dies_of_a_signal(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(
        "wmtp.cli.child.subprocess.Popen",
        lambda command, **how: POPEN(["/bin/sh", "-c", "kill -9 $$"], **how),
    )
    assert run_child([]) == 128 + 9


POPEN = subprocess.Popen


def record(step, weights=(0.5, 0.5), **more):
    shares = {f"weight_head_{k}": weight for k, weight in enumerate(weights)}
    return {"stage": "train", "step": step, "ce_head_0": 2.0, "ce_head_1": 4.0, **shares, **more}


RESULT = {"start": {"ce_per_head": [9.0, 9.0]}, "end": {"ce_per_head": [1.0, 2.0]}}


def test_weights_that_never_change_have_no_panel():
    assert plot._is_uniform([record(1), record(2)])
    assert not plot._is_uniform([record(1), record(2, (0.6, 0.4))])


def test_validation_is_from_the_start_to_the_end():
    records = [record(1), record(2, validation={"ce_per_head": [3.0, 4.0]}), record(3)]
    assert plot._validation(records, RESULT) == {0: 9.0, 2: 3.5, 3: 1.5}


def test_no_algorithm_is_left_out_of_the_picture():
    results = {str(number): RESULT for number in range(9)}
    runs = {name: [record(1)] for name in results}
    curves, ends = plot.plt.figure().subplots(1, 2)
    plot._plot_curves(curves, runs, results)
    plot._plot_ends(ends, results)
    for axes in (curves, ends):
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert set(results) <= set(names)
    plot.plt.close()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_the_picture_takes_a_run_of_any_size(weights, tmp_path):
    runs = {"one": [record(1), record(2, weights)][-1:], "two": [record(1), record(2, weights)]}
    file = tmp_path / "picture.png"
    plot.plot_comparison(runs, {"one": RESULT, "two": RESULT}, file)
    wide, high = Image.open(file).size
    assert wide == 1800
    assert high == (570 if weights == (0.5, 0.5) else 990)
