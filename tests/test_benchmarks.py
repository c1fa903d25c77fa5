"""The suite itself: contestants agree, bytes are counted exactly, the report's arithmetic."""

import io
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from support.command_line import wmtp
from support.made_up import columns_of, made_up
from wmtp.benchmarks import bench_loss, bench_scaling, memory, problem, providers, report
from wmtp.benchmarks.memory import available_bytes, loss_peak_bytes, peak_bytes
from wmtp.benchmarks.plot import plot_loss
from wmtp.benchmarks.problem import WEIGHTINGS, Case, Problem
from wmtp.benchmarks.tables import STUDIES, tables

SHAPE = (1, 64, 2, 1000)
# Those that compile take long, and are compared whenever they are timed.
CONTESTS = [
    (direction, provider)
    for direction, contestants in providers.DIRECTIONS.items()
    for provider in (*contestants, "copy")
    if provider not in providers.COMPILED
] + [("forward+backward", "product")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("direction", "provider"), CONTESTS)
def test_providers_agree(provider, direction, weighting, dtype):
    Problem(SHAPE, dtype, weighting).check(provider, direction)


def test_in_place_rounds_start_from_the_same_logits():
    inputs = Problem(SHAPE, torch.float32, "given")
    call = inputs.call("fused_inplace", "inplace")
    first, gradient = call()
    assert gradient.data_ptr() == inputs.logits.data_ptr()
    inputs.restore()
    torch.testing.assert_close(call()[0], first, rtol=0, atol=0)


def test_cce_is_given_factors_of_logits(monkeypatch):
    def linear_cross_entropy(hidden, classifier, targets, reduction, impl):
        assert (reduction, impl) == ("none", "torch_compile")
        logits = (hidden @ classifier.T).float()
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(
            targets.shape
        )

    module = types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    inputs = Problem(SHAPE, torch.float32, "given")
    inputs.check("cce", "forward")
    _, hidden_gradient, classifier_gradient = inputs.call("cce", "forward+backward")()
    assert (hidden_gradient.shape, classifier_gradient.shape) == ((*SHAPE[:3], 1), (1000, 1))


@pytest.mark.parametrize("provider", providers.UNCOMPILED)
def test_ours_is_one_graph_of_torch_compile_and_agrees(monkeypatch, provider):
    graphs = []

    def compile_counting(loss, **options):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        assert options.pop("fullgraph")
        return whole_compile(loss, backend=backend, fullgraph=True, **options)

    whole_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_counting)
    monkeypatch.setattr(providers, "_compiled", providers._compiled.__wrapped__)
    torch._dynamo.reset()
    Problem(SHAPE, torch.float32, "given").check(provider, "forward+backward")
    assert len(graphs) == 1
    operators = [str(node.target) for node in graphs[0].graph.nodes]
    assert any(name.startswith("wmtp.") for name in operators)
    assert any("matmul" in name for name in operators) == (provider == "product_compiled")


def test_a_wrong_gradient_of_a_factor_is_found(monkeypatch):
    def wrong(hidden, classifier, *arguments):
        return providers.product(hidden, 1.1 * classifier.detach() - 0.1 * classifier, *arguments)

    monkeypatch.setitem(problem.PROVIDERS, "product", wrong)
    with pytest.raises(AssertionError, match="of the gradient of the classifier"):
        Problem(SHAPE, torch.float32, "given").check("product", "forward+backward")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_provider_that_disagrees_is_found(monkeypatch, part):
    def wrong(logits, *arguments):
        if part == "loss":
            return providers.eager(logits, *arguments) + 0.01
        return providers.eager(
            torch.cat([logits[..., :-1], logits[..., -1:].detach()], -1), *arguments
        )

    monkeypatch.setitem(problem.PROVIDERS, "fused", wrong)
    with pytest.raises(AssertionError, match=f"fused disagrees .* of the {part}"):
        Problem(SHAPE, torch.float32, "given").check("fused", "forward+backward")


def test_suites_run_and_report_every_case():
    size = "tiny"
    shown, begun = [], time.monotonic()
    measured = report.run_suites(
        report.SUITES, size, lambda line: shown.append((time.monotonic() - begun, line))
    )
    assert shown[0][0] < 5
    assert len(shown) == 1 + len(measured["benchmarks"])
    assert shown[1][1].startswith("loss-")
    results = json.loads(json.dumps(report.gather("wmtp bench", size, [measured, measured])))
    cases = report.cases_by_key(results)
    assert {case.study for case in cases} == {"loss", "linear", *STUDIES}
    assert {case.provider for case in cases if case.study == "loss"} == {
        *("eager", "eager_float", "fused", "fused_inplace", "copy")
    }
    assert {case.provider for case in cases if case.study == "linear"} == {
        *("eager", "fused", "three_products", "two_products")
    }
    assert set(results["absent"]) == {"compiled", "cce", "linear_cross_entropy", "liger"}
    assert all(len(case["median_ms"]) == 2 for case in results["cases"])
    assert sum(table.row_count for table in tables(results)) > len(cases)


def test_a_provider_that_disagrees_fails_the_suite(monkeypatch, tmp_path):
    (tmp_path / "spoil.py").write_text(
        "from wmtp.benchmarks import providers\n"
        "providers.PROVIDERS['fused'] = lambda *arguments: 2 * providers.eager(*arguments)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p spoil --exitfirst")
    with pytest.raises(RuntimeError, match="fused disagrees with eager torch"):
        report.run_suites(["loss"], "tiny")


def test_suites_collect_without_the_packages_of_the_command_line():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'matplotlib']))\n"
        "from wmtp.benchmarks import bench_linear, bench_loss, bench_scaling"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_case_stands_twice():
    cases = bench_loss.CASES + bench_scaling.CASES
    assert len(set(cases)) == len(cases)


def test_peak_counts_what_was_held_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(600, dtype=torch.uint8)
        third = torch.empty(500, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call) == 1100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_holds_one_gradient_and_in_place_none(dtype):
    logits_bytes = 64 * 2 * 1000 * dtype.itemsize
    # A score of [B, S, H] tensors, and the exponentials of a row for each thread.
    small = 64 * 2 * 4 * 20 + torch.get_num_threads() * 1100 * 4

    def peak(provider, direction):
        return loss_peak_bytes(provider, direction, SHAPE, dtype, "cpu")

    assert logits_bytes <= peak("fused", "forward+backward") <= logits_bytes + small
    assert peak("fused_inplace", "inplace") <= small
    assert peak("fused", "forward") <= small
    assert peak("eager", "forward+backward") > 1.9 * logits_bytes


def test_available_memory_is_the_least_of_system_and_cgroups(monkeypatch, tmp_path):
    def write(file, text):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write("proc/meminfo", "MemTotal:  90 kB\nMemAvailable:   70 kB\nHugePages_Total:  0\n")
    assert available_bytes() == 70 * 1024

    write("proc/self/cgroup", "0::/outer/inner\n")
    write("cgroup/outer/inner/memory.max", "max\n")
    write("cgroup/outer/memory.max", "50000\n")
    write("cgroup/outer/memory.current", "30000\n")
    write("cgroup/outer/memory.stat", "anon 20000\ninactive_file 10000\n")
    assert available_bytes() == 50000 - 30000 + 10000

    write("proc/self/cgroup", "4:memory:/elsewhere\n1:cpu:/elsewhere\n")
    write("cgroup/memory/memory.limit_in_bytes", "40000\n")
    write("cgroup/memory/memory.usage_in_bytes", "5000\n")
    write("cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 3000\n")
    assert available_bytes() == 40000 - 5000 + 3000


def loss_results(shape, scale, runs=1):
    def case(provider, direction, *medians):
        return "loss", shape, provider, direction, [scale * ms for ms in medians[:runs]], {}

    return made_up(
        case("eager", "forward+backward", 8.0, 12.0),
        case("compiled", "forward+backward", 4.0, 4.0),
        case("fused", "forward+backward", 2.0, 4.0),
        case("copy", "forward+backward", 1.0, 1.0),
        case("fused_inplace", "inplace", 1.5, 1.5),
        case("copy", "inplace", 1.0, 1.0),
        case("fused", "forward", 0.5, 0.5),
        case("copy", "forward", 1.0, 1.0),
    )


def test_times_stand_beside_eager_and_compiled_and_the_copy():
    forward, both, inplace = tables(loss_results((1, 2, 2, 10), 1.0))
    columns = columns_of(both)
    assert columns["logits, provider"] == ["  eager", "  compiled", "  fused", "  copy"]
    assert columns["eager /"] == ["1.00x", "2.00x", "4.00x", "8.00x"]
    assert columns["comp. /"] == ["0.50x", "1.00x", "2.00x", "4.00x"]
    assert columns["/ copy"] == ["8.00x", "4.00x", "2.00x", "1.00x"]
    assert columns["peak"] == ["1.000"] * 4  # 40 elements of 4 bytes
    assert columns_of(inplace)["eager /"] == ["5.33x", "8.00x"]  # of forward + backward
    assert columns_of(inplace)["/ copy"] == ["1.50x", "1.00x"]
    assert columns_of(forward)["eager /"] == ["", ""]
    assert columns_of(forward)["median"] == ["500.0 us", "1.00 ms"]
    assert inplace.caption == "cpu x\nabsent: cce, not here"


def test_bandwidth_counts_the_bytes_that_the_job_needs():
    forward, both, _ = tables(loss_results((1, 256, 4, 32000), 10.0))  # 131.072 MB
    assert columns_of(forward)["GB/s"] == ["26.2", "26.2"]  # one read in 5 ms; two in 10 ms
    assert columns_of(both)["GB/s"] == ["3.3", "6.6", "13.1", "26.2"]


def test_ratios_are_taken_within_each_run():
    both = tables(loss_results((1, 2, 2, 10), 1.0, runs=2))[1]
    assert columns_of(both)["eager /"][2] == "3.50x\n3.00-4.00"  # 8 / 2 and 12 / 4
    assert columns_of(both)["/ copy"][0] == "10.0x\n8.00-12.0"


def test_studies_compare_with_their_own_peer():
    both = "forward+backward"
    results = made_up(
        ("threads", (1, 2, 2, 10), "fused", both, [6.0], {"threads": 1}),
        ("threads", (1, 2, 2, 10), "fused", both, [4.0], {"threads": 2}),
        ("weightings", (1, 2, 2, 10), "fused", both, [4.0], {"weighting": "given"}),
        ("weightings", (1, 2, 2, 10), "fused", both, [5.0], {"weighting": "ref_ce"}),
        ("odd vocabulary", (1, 2, 2, 128), "fused", both, [1.0], {}),
        ("odd vocabulary", (1, 2, 2, 80), "fused", both, [1.0], {}),
        ("sweep", (1, 2, 2, 10), "eager", both, [4.0], {}),
        ("sweep", (1, 2, 2, 10), "fused_inplace", "inplace", [5.0], {}),
        ("compiled", (1, 2, 2, 10), "product", both, [4.0], {}),
        ("compiled", (1, 2, 2, 10), "product_compiled", both, [4.4], {}),
    )
    sweep, threads, weightings, odd, compiled = map(columns_of, tables(results))
    assert sweep["eager /"] == ["1.00x", "0.80x"]
    assert threads["1 thread /"] == ["1.00x", "1.50x"]
    assert threads["threads"] == ["1", "2"]
    assert weightings["/ given"] == ["1.00x", "1.25x"]
    assert odd["/ 64n"][-1] == "1.60x"  # as long for 5/8 of the elements
    assert compiled["/ uncompiled"] == ["1.00x", "1.10x"]


def test_tables_fit_80_columns():
    results = loss_results((1, 128, 4, 256000), 100.0, runs=2)
    for table in tables(results):
        text = io.StringIO()
        Console(file=text, width=80).print(table)
        assert "…" not in text.getvalue()


def test_plot_writes_a_picture(tmp_path):
    results = loss_results((1, 2, 2, 10), 1.0, runs=2)
    results["cases"] += loss_results((1, 2, 2, 20), 3.0, runs=2)["cases"]
    plot_loss(results, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000  # an empty picture of this size has less


def test_command_runs_tabulates_and_writes(monkeypatch, tmp_path):
    asked = []

    def run_suites(suites, size, show):
        show("the case")
        asked.append((list(suites), size))
        (case,) = loss_results((1, 2, 2, 10), 1.0)["cases"][2:3]
        fields = {name: case[name] for name in (*Case._fields, "peak_bytes")}
        stats = {"rounds": 5, "median": 0.002 * len(asked), "q1": 0.001, "q3": 0.1}
        benchmarks = [{"extra_info": fields, "stats": stats}]
        return {"machine_info": {"cpu": {"brand_raw": "a CPU"}}, "benchmarks": benchmarks}

    monkeypatch.setattr(report, "run_suites", run_suites)
    json_file, plot_file = tmp_path / "new" / "loss.json", tmp_path / "loss.png"
    command = ["bench", "--quick", "--runs", "2", "--only", "loss"]
    done = wmtp(*command, "--json", str(json_file), "--plot", str(plot_file))
    assert done.exit_code == 0, done.output
    assert asked == [(["loss"], "quick")] * 2
    assert done.output.count("the case") == 2
    assert "3.00 ms" in done.output  # the median of 2 and 4
    written = json.loads(json_file.read_text())
    assert written["command"] == "wmtp bench --quick --runs 2 --only loss"
    assert written["environment"]["cpu"] == "a CPU"
    assert written["cases"][0]["median_ms"] == [2.0, 4.0]
    assert plot_file.exists()


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(command):
    done = wmtp(command, "--json", "/dev/null/results.json")
    assert done.exit_code == 1
    assert "error: cannot write /dev/null/results.json: " in done.output
    assert "choose another --json" in done.output


def test_a_disk_that_fills_up_costs_the_file_and_not_the_table(monkeypatch):
    results = {"machine_info": {"cpu": {}}, "benchmarks": []}
    monkeypatch.setattr(report, "run_suites", lambda *_: results)
    monkeypatch.setattr(report, "gather", lambda *_: loss_results((1, 2, 2, 10), 1.0))
    done = wmtp("bench", "--quick", "--json", "/dev/full")
    assert done.exit_code == 1
    assert "loss, forward" in done.output
    assert "error: cannot write /dev/full: No space left on device" in done.output


def test_command_says_what_failed(monkeypatch):
    def run_suites(suites, size, show):
        raise RuntimeError("fused disagrees")

    monkeypatch.setattr(report, "run_suites", run_suites)
    done = wmtp("bench", "--quick")
    assert (done.exit_code, "fused disagrees" in done.output) == (1, True)
