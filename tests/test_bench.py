"""The suites of `wmtp bench`: what is timed, the report's arithmetic, tables, pictures, command."""

import io
import json
import os
import time
from itertools import pairwise

import pytest
from rich.console import Console

from support.command_line import wmtp
from support.made_up import columns_of, made_up
from support.pictures import assert_drawn
from wmtp.benchmarks import bench, report
from wmtp.benchmarks.bench import present
from wmtp.benchmarks.plot import plot_loss
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import FLOORS, GRAD_HEADS, LINEAR
from wmtp.benchmarks.tables import STUDIES, tables

BOTH, FROZEN = FLOORS


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
        *("eager", "fused", *GRAD_HEADS, "three_products", "two_products")
    }
    assert set(results["absent"]) == {"compiled", "cce", "linear_cross_entropy", "liger"}
    assert all(len(case["median_ms"]) == 2 for case in results["cases"])
    assert sum(table.row_count for table in tables(results)) > len(cases)


def test_a_provider_that_disagrees_fails_the_suite(monkeypatch, tmp_path):
    """Which is collected without the packages of the command line."""
    (tmp_path / "spoil.py").write_text(
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'matplotlib']))\n"
        "from wmtp.benchmarks import providers\n"
        "wrong = providers.Provider(lambda *inputs: 2 * providers.eager(*inputs))\n"
        "providers.LOGITS['fused'] = wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p spoil --exitfirst")
    with pytest.raises(RuntimeError, match="fused disagrees with eager torch"):
        report.run_suites(["loss"], "tiny")


def test_no_case_stands_twice():
    cases = bench.LOSS + bench.SCALING
    assert len(set(cases)) == len(cases)


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
    assert_drawn(tmp_path / "loss.png")


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


# --- linear ---------------------------------------------------------------------------------------


def test_every_pass_times_everyone_once_but_the_slow_one():
    cases = [case for case in bench.LINEAR_CASES if case.dtype == "float32"]
    counts = {case: cases.count(case) for case in cases}
    assert {counts[case] for case in cases if case.provider in bench.ONCE} == {1}
    passes = {counts[case] for case in cases if case.provider not in bench.ONCE}
    assert passes == {bench.PASSES}
    assert cases[0] in cases[len(bench.CONTESTANTS) :]
    assert all(case != follower for case, follower in pairwise(cases))
    assert {(case.direction, case.provider) for case in cases} >= {
        *((BOTH, provider) for provider in LINEAR if provider != "eager_float"),
        *FLOORS.items(),
        (FROZEN, "fused"),
    }


def test_who_is_not_here_is_left_out():
    cases = present(bench.LINEAR_CASES, ["eager"]).mark.args[1]
    left_out = {case.provider for case in bench.LINEAR_CASES} - {case.provider for case in cases}
    assert left_out == {"eager"}


def linear_results(shape=(1, 256, 4, 128256), dim=512, runs=1):
    def case(provider, direction, weighting, *medians):
        fields = {"weighting": weighting, "dim": dim}
        return "linear", shape, provider, direction, medians[:runs], fields

    found = made_up(
        case("fused", BOTH, "given", 2200.0, 2300.0),
        case("fused", BOTH, "uniform", 2000.0, 3000.0),
        case("eager", BOTH, "uniform", 4000.0, 3000.0),
        case("linear_cross_entropy", BOTH, "uniform", 40000.0, 60000.0),
        case("three_products", BOTH, "uniform", 1000.0, 2000.0),
        case("fused", FROZEN, "uniform", 900.0, 900.0),
        case("two_products", FROZEN, "uniform", 600.0, 600.0),
    )
    for row in found["cases"]:
        row["peak_bytes"] = 2**31
    return found


def test_times_stand_beside_the_products_and_ours():
    both, frozen = map(columns_of, tables(linear_results()))
    assert both["/ products"] == ["2.20x", "2.00x", "4.00x", "40.0x", "1.00x"]
    assert both["/ fused"] == ["1.10x", "1.00x", "2.00x", "20.0x", "0.50x"]
    assert both["weights"][:2] == ["given", "uniform"]
    assert frozen["/ products"] == ["1.50x", "1.00x"]


def test_ratios_have_their_spread_and_fit_80_columns():
    found = tables(linear_results(runs=2))
    assert columns_of(found[0])["/ products"][1] == "1.75x\n1.50-2.00"
    for table in found:
        text = io.StringIO()
        Console(file=text, width=80).print(table)
        assert "…" not in text.getvalue()
        assert "1x256x4x128256 fp32 D=512" in text.getvalue()


def test_memory_is_counted_beyond_the_gradients():
    case = Case("linear", (1, 8, 2, 50), "bfloat16", BOTH, "fused", dim=4)
    assert case.gradient_bytes() == (16 + 50) * 4 * 2
    assert case._replace(direction=FROZEN).gradient_bytes() == 16 * 4 * 2
    both, _ = tables(linear_results())
    assert columns_of(both)["MiB"][0] == f"{2048 - 512 * 4 * (1024 + 128256) / 2**20:.1f}"


def test_a_case_of_several_passes_has_their_median():
    case = Case("linear", (1, 8, 2, 50), "float32", BOTH, "fused", dim=4)
    slow = case._replace(provider="linear_cross_entropy")

    def timed(case, seconds):
        stats = {"rounds": 2, "median": seconds, "q1": seconds, "q3": seconds}
        return {"extra_info": {**case._asdict(), "peak_bytes": 1}, "stats": stats}

    run = {
        "machine_info": {"cpu": {}},
        "benchmarks": [timed(case, 5.0), timed(slow, 9.0), timed(case, 1.0), timed(case, 2.0)],
    }
    gathered = report.gather("wmtp bench --linear", "quick", [run, run])
    first, second = report.cases_by_key(gathered).values()
    assert (first["median_ms"], first["rounds"]) == ([2000.0, 2000.0], [6, 6])
    assert (second["median_ms"], second["rounds"]) == ([9000.0, 9000.0], [2, 2])
    assert "liger" in gathered["absent"]


def test_results_from_before_there_was_a_hidden_size_are_read():
    old = made_up(("loss", (1, 2, 2, 10), "fused", BOTH, [1.0], {}))
    del old["cases"][0]["dim"]
    assert next(iter(report.cases_by_key(old))).dim == 0


def test_plot_of_the_linear_loss_writes_a_picture(tmp_path):
    found = linear_results(runs=2)
    found["cases"] += linear_results((1, 256, 4, 32000), runs=2)["cases"]
    plot_loss(found, tmp_path / "linear.png")
    assert_drawn(tmp_path / "linear.png")


def test_command_runs_the_linear_suite_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(report, "run_suites", lambda *given: asked.append(given[:2]))
    monkeypatch.setattr(
        report,
        "gather",
        lambda command, *_: {"command": command, **linear_results((1, 8, 2, 50), 4)},
    )
    json_file, plot_file = tmp_path / "linear.json", tmp_path / "linear.png"
    files = ["--json", str(json_file), "--plot", str(plot_file)]
    for option in (["--linear"], ["--only", "linear"], ["--linear", "--only", "linear"]):
        done = wmtp("bench", *option, "--quick", *files)
        assert done.exit_code == 0, done.output
        assert json.loads(json_file.read_text())["command"] == "wmtp bench --quick --linear"
    assert asked == [(["linear"], "quick")] * 3
    assert "/ three products" in done.output
    assert plot_file.exists()


def test_command_refuses_another_suite_beside_it():
    done = wmtp("bench", "--linear", "--only", "loss")
    assert (done.exit_code, "leave out --only loss" in done.output) == (2, True)
