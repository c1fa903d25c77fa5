"""One job of the GPU suite after the other: compared, counted, timed, or why not."""

import json
import os
import signal
import warnings

import pytest
import torch

from support.gpu_jobs import SMALL, CountingTimer, job, record_of
from wmtp.benchmarks import gpu, gpu_peers, gpu_worker, problem
from wmtp.benchmarks.gpu_worker import Bench


@pytest.mark.parametrize("provider", ["eager", "fused", "linear_cross_entropy", "copy"])
def test_a_job_is_compared_counted_and_timed(provider):
    if provider in gpu_peers.absent():
        pytest.skip(gpu_peers.absent()[provider])
    record = record_of(provider)
    assert (record["outcome"], record["median_ms"], record["p80_ms"]) == ("ok", 2.0, 3.0)
    assert (record["peak_bytes"] > 0) == (provider != "copy")
    assert tuple(record["shape"]) == SMALL


def test_a_wrong_result_fails_and_is_not_timed(monkeypatch):
    monkeypatch.setitem(problem.PROVIDERS, "fused", lambda logits, *rest: logits.square().sum())
    record = record_of("fused")
    assert record["outcome"] == "failed"
    assert record["why"].startswith("AssertionError: fused disagrees with eager torch in float32")
    assert "median_ms" not in record


def test_what_does_not_fit_is_said(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(problem.PROVIDERS, "eager", full)
    assert record_of("eager")["outcome"] == "does not fit"


@pytest.fixture
def bench_on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_worker, "Timer", CountingTimer)
    monkeypatch.setattr(gpu_worker, "Bench", lambda timer: Bench(timer, "cpu"))
    monkeypatch.setattr(gpu_worker, "device_answers", lambda: True)


def small_jobs(*providers):
    return [job(provider, "forward", SMALL, "float32") for provider in providers]


@pytest.mark.usefixtures("bench_on_cpu")
def test_what_a_compiler_makes_of_a_cut_off_is_no_failure(monkeypatch, tmp_path):
    def compiler(*inputs):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("ptxas failed") from None

    monkeypatch.setitem(problem.PROVIDERS, "compiled", compiler)
    records, before = tmp_path / "records", signal.getsignal(signal.SIGINT)
    try:
        assert gpu_worker.run_jobs(small_jobs("eager", "compiled", "copy"), 0, 60.0, records) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    (found,) = records.read_text().splitlines()
    assert json.loads(found)["provider"] == "eager"


@pytest.mark.usefixtures("bench_on_cpu")
def test_a_line_a_job_from_the_first_asked_for(tmp_path):
    records = tmp_path / "records"
    jobs = small_jobs("eager", "eager_float", "eager", "copy")
    assert gpu_worker.run_jobs(jobs, 1, 60.0, records) == 0
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["provider"] for record in found] == ["eager_float", "eager", "copy"]
    assert {record["outcome"] for record in found} == {"ok"}


@pytest.mark.usefixtures("bench_on_cpu")
def test_a_failed_job_ends_the_process_and_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(problem.PROVIDERS, "fused", lambda logits, *rest: logits.sum())
    records = tmp_path / "records"
    jobs = small_jobs("eager", "fused", "eager")
    assert gpu_worker.run_jobs(jobs, 0, 60.0, records) == gpu_worker.AGAIN
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["outcome"] for record in found] == ["ok", "failed"]


@pytest.mark.usefixtures("bench_on_cpu")
def test_a_steps_process_is_told_all_by_its_arguments(monkeypatch, tmp_path):
    jobs = {"tiers": small_jobs("eager", "eager_float", "copy")}
    monkeypatch.setattr(gpu, "all_jobs", lambda: jobs)
    records = tmp_path / "records"
    options = ["--first", "1", "--seconds", "60", "--records", str(records)]
    assert gpu.main(["--worker", "tiers", *options, "--cubins", str(tmp_path)]) == 0
    assert len(records.read_text().splitlines()) == 2


@pytest.mark.usefixtures("bench_on_cpu")
def test_no_job_begins_after_the_time_is_over(tmp_path):
    records = tmp_path / "records"
    assert gpu_worker.run_jobs(small_jobs("eager"), 0, -1.0, records) == 0
    assert not records.exists()


def test_a_tier_is_forced_inside_only():
    from wmtp.kernels import tiers

    with gpu_worker.forced_tier("token"):
        assert tiers.forced_tier() == "token"
    assert tiers.forced_tier() == ""


@pytest.mark.parametrize(("tier", "outcome"), [("token", "refused"), ("", "failed")])
def test_a_tier_that_cannot_serve_is_refused_and_not_failed(monkeypatch, tier, outcome):
    def choose(*inputs):
        raise ValueError("WMTP_TRITON_TIER=token cannot hold 4 x 256000 logits")

    monkeypatch.setitem(problem.PROVIDERS, "fused", choose)
    record = record_of("fused", tier=tier)
    assert (record["outcome"], record["tier"]) == (outcome, tier)
    assert record["why"].startswith("ValueError: WMTP_TRITON_TIER=token cannot hold")


def test_a_silent_fall_back_to_another_tier_is_an_error():
    message = "this device does not schedule clusters of 16 blocks"
    with gpu_worker.forced_tier("row"), pytest.raises(RuntimeWarning, match="schedule"):
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    with gpu_worker.forced_tier(""), pytest.warns(RuntimeWarning, match="schedule"):
        warnings.warn(message, RuntimeWarning, stacklevel=1)
