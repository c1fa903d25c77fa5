"""The linear suite: contestants agree, floors, passes, the report's arithmetic, the command."""

import io
import json
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from support.command_line import wmtp
from support.made_up import columns_of, made_up
from wmtp.benchmarks import bench_linear, linear_providers, report
from wmtp.benchmarks.linear_problem import LOSS_TOLERANCE, LinearProblem
from wmtp.benchmarks.plot import plot_linear
from wmtp.benchmarks.problem import WEIGHTINGS, Case
from wmtp.benchmarks.tables import tables
from wmtp.benchmarks.timing import suite

BOTH, FROZEN = linear_providers.DIRECTIONS
SHAPE, DIM = (1, 64, 2, 1000), 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def problem(dtype=torch.float32, weighting="uniform"):
    return LinearProblem(SHAPE, DIM, dtype, weighting=weighting)


@DTYPES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("direction", linear_providers.DIRECTIONS)
@pytest.mark.parametrize("provider", ["eager", "eager_float", "fused"])
def test_providers_agree(provider, direction, weighting, dtype):
    problem(dtype, weighting).check(provider, direction)


@DTYPES
def test_torch_in_chunks_agrees(dtype):
    if why := linear_providers.absent(compiling=True).get("linear_cross_entropy"):
        pytest.skip(why)
    problem(dtype).check("linear_cross_entropy", BOTH)


def cut_cross_entropy(hidden, weight, targets, reduction, impl):
    assert (reduction, impl) == ("none", "torch_compile")
    ce = F.cross_entropy((hidden @ weight.T).flatten(0, 2), targets.flatten(), reduction="none")
    return ce.view(targets.shape)


def liger_fused_linear_cross_entropy(x, weight, targets, ignore_index, reduction):
    assert (x.ndim, reduction) == (2, "sum")
    return F.cross_entropy(x @ weight.T, targets, ignore_index=ignore_index, reduction="sum")


@pytest.mark.parametrize(
    ("provider", "module", "function"),
    [
        ("cce", "cut_cross_entropy", {"linear_cross_entropy": cut_cross_entropy}),
        (
            "liger",
            "liger_kernel.transformers.functional",
            {"liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy},
        ),
    ],
)
def test_peers_are_called_as_they_take_it(monkeypatch, provider, module, function):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**function))
    problem().check(provider, BOTH)


@pytest.mark.parametrize(
    "part", ["loss", "gradient of the hidden states", "gradient of the weight"]
)
def test_a_provider_that_disagrees_is_found(monkeypatch, part):
    def wrong(hidden, weight, *arguments):
        if part.endswith("states"):
            hidden = torch.cat([hidden[:, :1].detach(), hidden[:, 1:]], 1)
        if part.endswith("weight"):
            weight = torch.cat([weight[:10].detach(), weight[10:]])
        return linear_providers.eager(hidden, weight, *arguments) + 0.01 * (part == "loss")

    monkeypatch.setitem(linear_providers.PROVIDERS, "fused", wrong)
    with pytest.raises(AssertionError, match=f"fused disagrees .* of the {part}"):
        problem().check("fused", BOTH)


def test_only_torchs_bf16_loss_is_given_more_room():
    assert list(LOSS_TOLERANCE) == [("linear_cross_entropy", torch.bfloat16)]


def test_floors_are_the_products_of_the_rows_with_a_target():
    inputs = problem()
    x, weight = inputs.hidden.detach().flatten(0, 2), inputs.weight.detach()
    x = x[torch.arange(len(x)) < 2 * 62 + 1]  # 63 targets of head 0, 62 of head 1
    three = inputs.call("three_products", BOTH)()
    logits = x @ weight.T
    torch.testing.assert_close(three, (logits @ weight, logits.T @ x))
    torch.testing.assert_close(inputs.call("two_products", FROZEN)(), three[:1])
    inputs.check("three_products", BOTH)


def test_frozen_asks_for_one_gradient():
    _, gradient = problem().call("fused", FROZEN)()
    assert gradient.shape == (*SHAPE[:3], DIM)


def test_every_pass_times_everyone_once_but_the_slow_one():
    cases = [case for case in bench_linear.CASES if case.dtype == "float32"]
    counts = {case: cases.count(case) for case in cases}
    assert {counts[case] for case in cases if case.provider in bench_linear.ONCE} == {1}
    passes = {counts[case] for case in cases if case.provider not in bench_linear.ONCE}
    assert passes == {bench_linear.PASSES}
    assert cases[0] in cases[len(bench_linear.CONTESTANTS) :]
    assert all(case != follower for case, follower in pairwise(cases))
    assert {(case.direction, case.provider) for case in cases} >= {
        *((BOTH, provider) for provider in linear_providers.PROVIDERS if provider != "eager_float"),
        *linear_providers.DIRECTIONS.items(),
        (FROZEN, "fused"),
    }


def test_who_cannot_run_here_is_left_out_and_told_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    quick = linear_providers.absent(compiling=False)
    assert set(quick) == {"compiled", "cce", "linear_cross_entropy", "liger"}
    assert linear_providers.absent(compiling=True)["liger"] == "its kernels need a GPU"
    (cases,) = (mark.args[1] for mark in [suite(bench_linear.CASES, lambda _: ("eager",)).mark])
    assert {case.provider for case in bench_linear.CASES} - {case.provider for case in cases} == {
        "eager"
    }


# --- the report -----------------------------------------------------------------------------------


def results(shape=(1, 256, 4, 128256), dim=512, runs=1):
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
    both, frozen = map(columns_of, tables(results()))
    assert both["/ products"] == ["2.20x", "2.00x", "4.00x", "40.0x", "1.00x"]
    assert both["/ fused"] == ["1.10x", "1.00x", "2.00x", "20.0x", "0.50x"]
    assert both["weights"][:2] == ["given", "uniform"]
    assert frozen["/ products"] == ["1.50x", "1.00x"]


def test_ratios_have_their_spread_and_fit_80_columns():
    found = tables(results(runs=2))
    assert columns_of(found[0])["/ products"][1] == "1.75x\n1.50-2.00"
    for table in found:
        text = io.StringIO()
        Console(file=text, width=80).print(table)
        assert "…" not in text.getvalue()
        assert "1x256x4x128256 fp32 D=512" in text.getvalue()


def test_memory_is_counted_beyond_the_gradients():
    case = Case("linear", (1, 8, 2, 50), "bfloat16", BOTH, "fused", dim=4)
    assert report.gradient_bytes(case) == (16 + 50) * 4 * 2
    assert report.gradient_bytes(case._replace(direction=FROZEN)) == 16 * 4 * 2
    both, _ = tables(results())
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


def test_plot_writes_a_picture(tmp_path):
    found = results(runs=2)
    found["cases"] += results((1, 256, 4, 32000), runs=2)["cases"]
    plot_linear(found, tmp_path / "linear.png")
    content = (tmp_path / "linear.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000  # an empty picture of this size has less


def test_command_runs_the_suite_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(report, "run_suites", lambda *given: asked.append(given[:2]))
    monkeypatch.setattr(
        report, "gather", lambda command, *_: {"command": command, **results((1, 8, 2, 50), 4)}
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
