"""The GPU suite where there is no GPU: what it would run, predicts, survives and writes."""

import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from wmtp.benchmarks import gpu, gpu_peers, gpu_worker, problem
from wmtp.benchmarks.gpu_cases import (
    PREDICTED_CARD,
    SIZES,
    Job,
    importance,
    predicted_ms,
    predicted_tier,
    speed_jobs,
    tier_jobs,
)
from wmtp.benchmarks.gpu_report import compared, markdown, plot, predicted_records, write
from wmtp.benchmarks.gpu_timing import Times, percentiles, rounds_for
from wmtp.benchmarks.gpu_worker import Bench, new_record
from wmtp.benchmarks.problem import Case

MAIN = (1, 1024, 4, 32000)
BOTH = "forward+backward"


def job(provider="fused", direction=BOTH, shape=MAIN, dtype="bfloat16", weights="given", tier=""):
    return Job(Case("speed", shape, dtype, direction, provider, weights), tier)


# --- without a device ---------------------------------------------------------------------------


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


# --- cases and predictions ----------------------------------------------------------------------


def test_most_important_cases_first():
    jobs = speed_jobs(absent=["liger"])
    places = [importance(job) for job in jobs]
    assert places == sorted(places)
    assert SIZES[0] == (4096, 4)
    assert jobs[0].case.shape == MAIN
    assert jobs[0].case.provider == "fused"
    first_compiled = next(i for i, job in enumerate(jobs) if job.case.provider == "compiled")
    first_smaller = next(i for i, job in enumerate(jobs) if job.case.shape[:3] != (1, 1024, 4))
    assert 0 < first_compiled < first_smaller
    assert len(set(jobs)) == len(jobs)
    assert "liger" not in {job.case.provider for job in jobs}
    assert {job.case.provider for job in jobs} >= {"fused", "fused_inplace", "copy", "quack"}
    assert {job.case.provider for job in jobs if job.case.weighting == "none"} == {
        *("quack", "flash_attn", "cce_kernel", "linear_cross_entropy")
    }


def test_every_shape_dtype_and_direction_is_there():
    jobs = speed_jobs()
    assert {job.case.shape[-1] for job in jobs} == {32000, 50257, 128256, 256000}
    assert {(j.case.shape[1] * j.case.shape[2], j.case.shape[2]) for j in jobs} == {
        (rows, heads) for rows in (2**10, 2**12, 2**15) for heads in (1, 4)
    }
    copies = [job for job in jobs if job.case.provider == "copy"]
    assert len(copies) == 4 * 6 * 2  # once a problem


def test_tiers_are_forced_wherever_they_can_serve():
    forced = {(job.tier, job.case.weighting) for job in tier_jobs()}
    assert forced == {
        ("token", "given"),
        ("row", "given"),
        ("online", "given"),
        ("token", "ref_ce"),
        ("online", "ref_ce"),
    }


# 1024 x 4 x 32000 bf16 are 262.144 MB, at 0.9 x 3.35 TB/s 86.95 us.
@pytest.mark.parametrize(
    ("case", "tier", "units"),
    [
        (job(direction="forward"), "online", 1),
        (job(), "row", 2),
        (job("fused_inplace", "inplace"), "row", 2),
        (job(weights="ref_ce"), "token", 2),
        (job(tier="online"), "online", 3),  # 132 SMs x 8 programs x 64 KB: 67 MB, the L2 is 52
        (job(provider="copy"), "", 2),
        # H = 4 of 256000 exceed the registers of 16 CTAs; one row does not.
        (job(weights="ref_ce", shape=(1, 128, 4, 256000)), "online", 3),
        (job(shape=(1, 128, 4, 256000)), "row", 2),
        # 16 tokens x 4 x 64 KB lie in the L2 when they are read again.
        (job(weights="ref_ce", tier="online", shape=(1, 16, 4, 32000)), "online", 2),
    ],
)
def test_prediction_by_hand(case, tier, units):
    assert predicted_tier(case) == tier
    elements = torch.Size(case.case.shape).numel()
    assert predicted_ms(case) == pytest.approx(units * 0.0869465 * elements / 131_072_000, rel=1e-5)


def test_no_prediction_for_other_peoples_code_or_an_impossible_tier():
    assert predicted_ms(job(provider="eager")) is None
    assert predicted_ms(job(weights="ref_ce", shape=(1, 8, 4, 256000), tier="token")) is None
    assert PREDICTED_CARD.bytes_a_second == 3.35e12


# --- timing -------------------------------------------------------------------------------------


def test_percentiles_by_hand():
    # Six values: the 20th percentile is the second smallest, the 80th the second largest.
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    median, low, high = percentiles([float(i) for i in range(101)])
    assert (median, low, high) == pytest.approx((50, 20, 80))


def test_rounds_are_at_least_ten():
    assert [rounds_for(seconds) for seconds in (1.0, 0.01, 1e-6)] == [10, 15, 100]


# --- one job ------------------------------------------------------------------------------------


class CountingTimer:
    """In place of one that needs events of a device."""

    def time(self, call, prepare):
        prepare()
        call()
        return Times(10, 2.0, 1.0, 3.0, 0.1)


SMALL = (1, 8, 2, 50)


def record_of(provider, direction=BOTH, **options):
    case = job(provider, direction, SMALL, "float32", **options)
    return Bench(CountingTimer(), "cpu").record(case)


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


# --- peers --------------------------------------------------------------------------------------


def liger_module(factor):
    def liger_cross_entropy(logits, targets, ignore_index):
        return factor * F.cross_entropy(logits, targets, ignore_index=ignore_index)

    return types.SimpleNamespace(liger_cross_entropy=liger_cross_entropy)


def test_peers_are_compared_with_a_mean_cross_entropy(monkeypatch):
    name = "liger_kernel.transformers.functional"
    monkeypatch.setitem(sys.modules, name, liger_module(1.0))
    peer = gpu_peers.PeerProblem("liger", SMALL, torch.float32, "cpu")
    peer.check("liger", "forward")
    peer.check("liger", BOTH)
    peer.call("liger", BOTH)()  # a second round
    _, gradient = peer.call("liger", BOTH)()
    assert gradient.shape == SMALL
    # Heads 0 and 1 of 8 tokens: 7 + 6 rows have a target.
    assert (gradient.abs().sum(-1) > 0).sum() == 13
    monkeypatch.setitem(sys.modules, name, liger_module(1.1))
    with pytest.raises(AssertionError, match=r"liger disagrees .* of the loss"):
        peer.check("liger", "forward")


def test_others_that_break_are_no_failure_of_ours(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no C compiler\nand much more")

    monkeypatch.setitem(problem.PROVIDERS, "compiled", broken)
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
    expected = dict.fromkeys(("tests", "speed", "tiers", "snapshot"), "ok")
    expected |= {"sanitizer": "absent", "picture": "absent"}
    assert steps == {**expected, **({failing: "failed"} if failing else {})}
    assert len(written["cases"]) == 4


# --- results ------------------------------------------------------------------------------------


def timed(case, milliseconds, peak=0, tier=""):
    times = Times(10, milliseconds, 0.9 * milliseconds, 1.1 * milliseconds, 0.05)
    return {**new_record(case, "ok"), **times._asdict(), "peak_bytes": peak, "tier": tier}


def made_up():
    return compared(
        [
            timed(job("fused", "forward"), 0.1, tier="online"),
            timed(job("fused"), 0.25, 262_144_000, "row"),
            timed(job("copy"), 0.2),
            timed(job("eager"), 2.0, 3 * 262_144_000),
            timed(job("liger"), 1.0),
            timed(job("fused_inplace", "inplace"), 0.2, 262_144, "row"),
            new_record(job("compiled"), "not run", "out of time"),
            new_record(job(shape=(1, 8192, 4, 256000), dtype="float32"), "does not fit"),
        ]
    )


def test_bandwidth_is_compared_with_the_copys():
    forward, both, copy, *_ = made_up()
    assert copy["gb_s"] == 2621.4  # 2 x 262.144 MB in 0.2 ms
    assert both["of_copy"] == 0.8
    assert forward["gb_s"] == 2621.4  # one read in half of the time
    assert forward["of_copy"] == 1.0
    assert both["peak"] == 1.0
    assert both["predicted_ms"] == pytest.approx(0.173893, rel=1e-5)
    assert made_up()[3]["predicted_ms"] is None


def page():
    steps = [{"name": "tests", "outcome": "failed", "why": "cut off", "seconds": 120.0}]
    environment = {"gpu": "NVIDIA H100", "driver": "580", "torch": "2.11", "cuda-bindings": None}
    results = {"command": "python -m benchmarks.gpu --out D", "environment": environment}
    return {**results, "absent": {"quack": "not here"}, "steps": steps, "cases": made_up()}


def test_markdown_by_hand():
    text = markdown(page())
    assert "gpu NVIDIA H100, driver 580, torch 2.11\n" in text
    assert "| tests | failed (120 s) | cut off |" in text
    assert "- absent: quack, not here" in text
    assert "| 32000 | bfloat16 | 100 % | 80 % | 100 % | 0.0010 | 8.0x |  | 4.0x |  |" in text
    row = (
        "| 1x1024x4x32000 | bfloat16 | fused | given | row | 0.2500 | 0.2250-0.2750 | 2097 | 80 % "
    )
    assert row + "| 1.000 | 0.1739 *predicted* |" in text
    assert "fused-given" in text.split("## Without a time")[1]
    assert "not run (out of time)" in text
    assert "does not fit\n" in text


def test_every_row_of_a_table_has_its_columns():
    table = []
    for line in [*markdown(page()).splitlines(), ""]:
        if line.startswith("| "):
            table.append(line.count(" | "))
        elif table:
            assert set(table) == {table[0]}
            table = []


def test_json_holds_everything(tmp_path):
    write(page(), tmp_path / "new", "gpu")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == json.loads(json.dumps(page()))


def test_predictions_have_no_measured_number():
    found = predicted_records([job(), job("eager"), job("copy")])
    assert [record["provider"] for record in found] == ["fused", "copy"]
    assert [record["tier"] for record in found] == ["row", ""]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot(made_up(), tmp_path / "gpu.png") is None
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert plot([], tmp_path / "none.png") == "no picture: nothing was timed at the main size"


def test_no_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(made_up(), tmp_path / "gpu.png").startswith("no picture: ")
    assert not list(tmp_path.iterdir())


# --- cubins -------------------------------------------------------------------------------------
