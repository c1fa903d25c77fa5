"""One job of the GPU suite after the other: compared, counted, timed, or why not."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch

from support.gpu_cases import BOTH, SMALL, CountingTimer, record_of, speed_case
from wmtp.benchmarks import gpu, gpu_worker
from wmtp.benchmarks.gpu_cases import all_cases
from wmtp.benchmarks.gpu_processes import read_records
from wmtp.benchmarks.gpu_worker import Recorder, parts, run_cases
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import LINEAR, LOGITS, OURS, PEERS, Provider, absent


@pytest.mark.parametrize("provider", ["eager", "fused", "linear_cross_entropy", "copy"])
def test_a_job_is_compared_counted_and_timed(provider):
    if why := absent(PEERS).get(provider):
        pytest.skip(why)
    record = record_of(provider)
    assert (record["outcome"], record["median_ms"], record["p80_ms"]) == ("ok", 2.0, 3.0)
    assert (record["peak_bytes"] > 0) == (provider != "copy")
    assert tuple(record["shape"]) == SMALL


def test_a_wrong_result_fails_and_is_not_timed(monkeypatch):
    monkeypatch.setitem(LOGITS, "fused", Provider(lambda logits, *rest: logits.square().sum()))
    record = record_of("fused")
    assert record["outcome"] == "failed"
    assert record["why"].startswith("AssertionError: fused disagrees with eager torch in float32")
    assert "median_ms" not in record


def test_what_does_not_fit_is_said(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(LOGITS, "eager", Provider(full))
    assert record_of("eager")["outcome"] == "does not fit"


@pytest.fixture
def bench_on_cpu(monkeypatch):
    """Runs cases as a step's process does."""
    monkeypatch.setattr(gpu, "Timer", CountingTimer)
    monkeypatch.setattr(gpu, "Recorder", lambda timer: Recorder(timer, "cpu"))
    before = signal.getsignal(signal.SIGINT)

    def run(cases, first, seconds, records):
        return run_cases(cases, first, seconds, records, Recorder(CountingTimer(), "cpu").record)

    yield run
    signal.signal(signal.SIGINT, before)


def small_cases(*providers):
    return [speed_case(provider, "forward", SMALL, "float32") for provider in providers]


def test_what_a_compiler_makes_of_a_cut_off_is_no_failure(bench_on_cpu, monkeypatch, tmp_path):
    def compiler(*inputs):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("ptxas failed") from None

    monkeypatch.setitem(LOGITS, "compiled", Provider(compiler))
    records = tmp_path / "records"
    assert bench_on_cpu(small_cases("eager", "compiled", "copy"), 0, 60.0, records) == 0
    (found,) = records.read_text().splitlines()
    assert json.loads(found)["provider"] == "eager"


def test_a_line_a_job_from_the_first_asked_for(bench_on_cpu, tmp_path):
    records = tmp_path / "records"
    cases = small_cases("eager", "eager_float", "eager", "copy")
    assert bench_on_cpu(cases, 1, 60.0, records) == 0
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["provider"] for record in found] == ["eager_float", "eager", "copy"]
    assert {record["outcome"] for record in found} == {"ok"}


def test_a_failed_job_ends_the_process_and_is_told(bench_on_cpu, monkeypatch, tmp_path):
    monkeypatch.setitem(LOGITS, "fused", Provider(lambda logits, *rest: logits.sum()))
    records = tmp_path / "records"
    cases = small_cases("eager", "fused", "eager")
    assert bench_on_cpu(cases, 0, 60.0, records) == gpu_worker.AGAIN
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["outcome"] for record in found] == ["ok", "failed"]


def test_a_steps_process_is_told_all_by_its_arguments(bench_on_cpu, monkeypatch, tmp_path):
    cases = {"tiers": small_cases("eager", "eager_float", "copy")}
    monkeypatch.setattr(gpu, "all_cases", lambda: cases)
    records = tmp_path / "records"
    options = ["--first", "1", "--seconds", "60", "--records", str(records)]
    assert gpu.main(["--worker", "tiers", *options]) == 0
    assert len(records.read_text().splitlines()) == 2


def test_no_job_begins_after_the_time_is_over(bench_on_cpu, tmp_path):
    records = tmp_path / "records"
    assert bench_on_cpu(small_cases("eager"), 0, -1.0, records) == 0
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

    monkeypatch.setitem(LOGITS, "fused", Provider(choose))
    record = record_of("fused", tier=tier)
    assert (record["outcome"], record["tier"]) == (outcome, tier)
    assert record["why"].startswith("ValueError: WMTP_TRITON_TIER=token cannot hold")


# --- linear ---------------------------------------------------------------------------------------


def linear_case(provider, direction=BOTH, weights="uniform"):
    return Case("linear", SMALL, "bfloat16", direction, provider, weights, dim=16)


@pytest.mark.parametrize(
    ("provider", "direction"),
    [("fused", BOTH), ("fused", "frozen"), ("eager", BOTH), ("three_products", BOTH)],
)
def test_a_linear_case_is_compared_counted_and_timed(provider, direction):
    bench = Recorder(CountingTimer(), "cpu")
    for weights in ("uniform", "ref_ce"):
        record = bench.record(linear_case(provider, direction, weights))
        assert (record["outcome"], record["median_ms"]) == ("ok", 2.0), record["why"]
        assert (record["tier"], record["dim"]) == ("", 16)
        assert record["peak_bytes"] > 0


def test_a_wrong_result_of_ours_fails_and_a_peers_is_refused(monkeypatch):
    def wrong(hidden, weight, *rest):
        return (hidden.sum() + weight.sum()).square()

    for provider, outcome in (("fused", "failed"), ("liger", "refused")):
        monkeypatch.setitem(LINEAR, provider, Provider(wrong))
        record = Recorder(CountingTimer(), "cpu").record(linear_case(provider))
        assert record["outcome"] == outcome
        assert record["why"].startswith(f"AssertionError: {provider} disagrees with eager torch")


def test_others_that_break_are_no_failure_of_ours(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no C compiler\nand much more")

    monkeypatch.setitem(LOGITS, "compiled", Provider(broken))
    record = record_of("compiled")
    assert (record["outcome"], record["why"]) == ("refused", "RuntimeError: no C compiler")


def test_what_a_peer_raises_is_its_refusal(monkeypatch):
    def refuse(logits, targets, **options):
        raise AssertionError("Input N 50 is not divisible by vector size 8")

    module = types.SimpleNamespace(cross_entropy=refuse)
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    record = record_of("quack")
    assert (record["outcome"], record["why"]) == (
        "refused",
        "AssertionError: Input N 50 is not divisible by vector size 8",
    )


# --- compile -------------------------------------------------------------------------------------


def test_every_kind_of_call_is_compiled_once_and_together_with_its_likes():
    cases = [case for cases in all_cases().values() for case in cases]
    shares = parts(cases, 5)
    found = [case for share in shares for case in share]
    assert {case.provider for case in found} == set(OURS)
    kinds = [(*case.shape[2:], *case[2:]) for case in found]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == {(*one.shape[2:], *one[2:]) for one in cases if one.provider in OURS}
    owners = {}
    for number, share in enumerate(shares):
        for one in share:
            likes = one.shape[2:], one.dtype, one.dim, one.weighting
            assert owners.setdefault(likes, number) == number
    assert set(owners.values()) == set(range(5))


# Triton's own compiler, told that there is an H100; what it makes lies in its cache on disk.
H100 = """
import functools, json, sys
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Card:
    get_current_device = get_current_stream = lambda self, *rest: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Card())
from wmtp import backends, kernels
from wmtp.benchmarks import gpu_worker
from wmtp.benchmarks.problem import Problem, case_of
from wmtp.benchmarks.providers import LOGITS, Provider
from wmtp.kernels import tiers

backends.DEFAULT_FOR_DEVICE["cpu"] = "triton"
kernels.interpreted = lambda: True
tiers.machine = lambda device: tiers.Machine(32, 1, 4)
LOGITS["fused_inplace"] = Provider(lambda *_: {}["nobody"])
cases, cache = [case_of(record) for record in json.loads(sys.argv[2])], Path(sys.argv[1])
compile_case = functools.partial(gpu_worker.compile_case, device="cpu")
gpu_worker.run_cases(cases, 0, 60.0, Path(sys.argv[3]), compile_case)
before = set(cache.iterdir())
assert any(cache.rglob("register_kernel.cubin")) and any(cache.rglob("scale_kernel.cubin"))
# The calls of a timing: in a process that knows no binary nothing is left to compile.
for one in cases[:2]:
    for module in list(sys.modules.values()):
        for kernel in vars(module).values() if "wmtp.kernels" in module.__name__ else ():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    with gpu_worker.compile_only() as binaries:
        problem = Problem(one.shape, one.torch_dtype, "cpu", one.dim)
        problem.call(one.provider, one.direction, one.weighting)()
    assert binaries
    new = {file.stem for made in set(cache.iterdir()) - before for file in made.glob("*.cubin")}
    # To the linear loss's scale_kernel the number of rows is a constant.
    assert new <= ({"scale_kernel"} if one.dim else set()), new
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Records of four cases: two that can be had, a tier that cannot, a provider that breaks."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("compiled")
    small, wide = (1, 40, 2, 700), (1, 40, 2, 70000)
    cases = [
        Case("speed", small, "bfloat16", BOTH, "fused", tier="row"),
        Case("linear", small, "bfloat16", BOTH, "fused", "uniform", dim=16),
        Case("tiers", wide, "bfloat16", BOTH, "fused", "ref_ce", tier="token"),
        Case("speed", small, "bfloat16", "inplace", "fused_inplace"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (folder / "cache").mkdir()
    told = json.dumps([case._asdict() for case in cases])
    done = subprocess.run(
        [sys.executable, "-c", H100, str(folder / "cache"), told, str(folder / "records")],
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return read_records(folder / "records")


def test_nothing_is_left_to_compile_when_a_case_is_timed(compiled):
    given, linear, *_ = compiled
    assert (given["outcome"], linear["outcome"]) == ("ok", "ok")
    assert len(given["binaries"]) == 4  # weights, row, finish, and what scales the gradient
    assert linear["binaries"]


def test_what_cannot_be_had_is_told_and_stops_nothing(compiled):
    *_, unservable, broken = compiled
    assert unservable["outcome"] == "refused"
    assert unservable["why"].startswith("ValueError: WMTP_TRITON_TIER=token cannot hold")
    assert (broken["outcome"], broken["why"]) == ("failed", "KeyError: 'nobody'")
