"""`wmtp profile --linear`: the same of hidden states and unembedding."""

import itertools
import json

import pytest
import torch

from support.command_line import printed, unwrapped, wmtp
from support.pictures import assert_drawn
from wmtp.benchmarks import profile as sweeps
from wmtp.benchmarks.memory import MEBI, loss_peak_bytes
from wmtp.benchmarks.plot import plot_profile
from wmtp.benchmarks.profile import (
    SPARE,
    Setting,
    allowed_bytes,
    caption,
    chunk_scratch_bytes,
    profile,
    scratch_bytes,
    sweep,
    table,
    write_snapshot,
)

LINEAR = Setting(2, torch.bfloat16, "cpu", "cpu")._replace(dim=64, chunk_bytes=MEBI)
BOTH = "forward+backward"


def whole_command(*arguments):
    return wmtp("profile", *arguments)


def found(results, provider, direction=BOTH):
    return [
        case
        for case in results["cases"]
        if (case["provider"], case["direction"]) == (provider, direction)
    ]


def test_sweep_goes_over_v_then_over_s():
    assert sweep([10, 20], [4]) == [(4, 10), (4, 20)]
    assert sweep([10, 20], [4, 8]) == [(4, 10), (4, 20), (8, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_and_little_more_whatever_v_and_s_are(dtype):
    setting = LINEAR._replace(dtype=dtype)
    results = profile(sweep([4000, 16000], [64, 1024]), setting)
    allowed = allowed_bytes(MEBI)
    assert allowed == 1.25 * MEBI + 8 * MEBI
    for direction in (BOTH, "frozen"):
        ours = found(results, "fused", direction)
        assert all(chunk_scratch_bytes(case) <= allowed for case in ours)
        eager = found(results, "eager", direction)
        logits_bytes = 1024 * 2 * 4000 * dtype.itemsize
        assert scratch_bytes(eager[2]) > 1.9 * logits_bytes
        # 16 times the tokens, and four times the vocabulary; a part of a product may be 2 MiB.
        assert max(map(chunk_scratch_bytes, ours)) - min(map(chunk_scratch_bytes, ours)) < 4 * MEBI


def test_the_sum_of_a_16_bit_gradient_is_counted_where_there_is_one():
    (ours,) = found(profile([(64, 4000)], LINEAR), "fused")
    assert ours["sum_bytes"] == 4000 * 64 * 4
    assert ours["gradient_bytes"] == (64 * 2 + 4000) * 64 * 2
    assert ours["chunk_bytes"] == MEBI
    assert scratch_bytes(ours) == chunk_scratch_bytes(ours) + ours["sum_bytes"]
    expected = loss_peak_bytes(
        *("fused", BOTH, (1, 64, 2, 4000), torch.bfloat16, "cpu", 64), chunk_bytes=MEBI
    )
    assert ours["peak_bytes"] == expected
    whole = LINEAR._replace(chunk_bytes=None)
    one_chunk = profile([(64, 4000)], whole)
    assert found(one_chunk, "fused")[0]["sum_bytes"] == 0
    assert found(one_chunk, "fused")[0]["chunk_bytes"] == 2048 * (4000 * 2 + 64 * 8)
    for changed in ({"dtype": torch.float32}, {}):
        results = profile([(64, 4000)], LINEAR._replace(**changed))
        direction = BOTH if changed else "frozen"
        assert found(results, "fused", direction)[0]["sum_bytes"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_derived_is_what_is_measured(dtype):
    setting = LINEAR._replace(dtype=dtype)
    many, few = (profile([(length, 20000)], setting) for length in (256, 4))
    for name in itertools.product(["eager", "eager_float"], [BOTH, "frozen"]):
        (case,) = found(many, *name)
        assert case["derived_bytes"] == case["peak_bytes"], name
        # Few rows, where the moment of the peak may change with V: never more.
        (case,) = found(few, *name)
        assert 0 < case["derived_bytes"] <= case["peak_bytes"], name


def ran(monkeypatch, room):
    """(provider, V) of the cases that are run where there is so much room beyond the inputs."""
    calls = []

    def peak(provider, direction, shape, *rest, **options):
        calls.append((provider, shape[-1]))
        return loss_peak_bytes(provider, direction, shape, *rest, **options)

    inputs = (256 * 2 + 20000) * 64 * 2
    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
    monkeypatch.setattr(sweeps, "available_bytes", lambda: SPARE + inputs + room)
    return calls


def test_what_would_not_fit_is_not_run_but_derived(monkeypatch):
    logits_bytes = 256 * 2 * 20000 * 2
    calls = ran(monkeypatch, 4 * logits_bytes)  # eager holds 3, after .float() 6
    results = profile([(256, 20000)], LINEAR)
    (eager,), (unfit,) = found(results, "eager"), found(results, "eager_float")
    assert eager["run"]
    assert (unfit["run"], unfit["peak_bytes"]) == (False, None)
    assert unfit["derived_bytes"] > 5.9 * logits_bytes
    assert ("eager_float", 20000) not in calls
    text = unwrapped(printed(table(results), caption(results)))
    assert f">= {scratch_bytes(unfit) / MEBI:.1f}" in text
    assert "not run" in text
    assert "V = 512 and 1024" in text


def test_nothing_is_derived_from_what_would_not_fit_either(monkeypatch):
    calls = ran(monkeypatch, 3 * MEBI)
    results = profile([(256, 20000)], LINEAR)
    assert calls == []
    assert {case["derived_bytes"] for case in results["cases"]} == {None}
    text = printed(table(results), caption(results))
    assert text.count("not fit") == 6 + 1  # once in the caption
    assert ">= " not in text


def test_a_linear_case_that_runs_out_of_memory_leaves_one_cell_empty(monkeypatch):
    def peak(provider, *rest, **options):
        if provider == "fused":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_peak_bytes(provider, *rest, **options)

    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
    results = profile([(8, 300)], LINEAR)
    assert [case["provider"] for case in results["cases"] if case["peak_bytes"] is None] == [
        *("fused", "fused")
    ]
    assert "ran out of cpu memory" in printed(table(results), caption(results))


def test_a_snapshot_of_the_linear_loss_holds_an_eager_and_a_fused_step(monkeypatch, tmp_path):
    happened = []

    def peak(provider, direction, shape, *rest, **options):
        happened.append((provider, direction, shape))
        return 0

    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all": None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", happened.append)
    write_snapshot(tmp_path / "snapshot.pickle", (8, 300), LINEAR)
    shape = (1, 8, 2, 300)
    assert happened == [
        ("eager", BOTH, shape),
        ("fused", BOTH, shape),
        str(tmp_path / "snapshot.pickle"),
    ]


def test_command_tabulates_draws_and_writes_the_linear_loss(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    json_file, plot_file = tmp_path / "new" / "linear.json", tmp_path / "linear.png"
    sizes = ("--vocab", "300,2000", "--seq-len", "8,16", "--horizon", 2, "--dtype", "float32")
    options = ("--linear", *sizes, "--dim", 16, "--chunk-bytes", 50000)
    done = whole_command(*options, "--json", json_file, "--plot", plot_file)
    assert done.exit_code == 0, done.output
    assert "[1, S, 2, 16] and [V, 16], float32, cpu, backend cpu" in unwrapped(done.output)
    written = json.loads(json_file.read_text())
    assert written["command"].endswith(
        "wmtp profile --vocab 300,2000 --seq-len 8,16 --horizon 2 --dtype float32 --backend auto "
        "--linear --dim 16 --chunk-bytes 50000"
    )
    sizes = {(case["length"], case["vocabulary"]) for case in written["cases"]}
    assert sizes == {(8, 300), (8, 2000), (16, 300)}
    assert len(written["cases"]) == 3 * 2 * 3
    assert_drawn(plot_file)


def test_command_refuses_what_does_not_go_together():
    for options in (["--seq-len", "8,16"], ["--dim", "8"], ["--chunk-bytes", "8"]):
        done = whole_command(*options)
        assert done.exit_code == 2
        assert "go with --linear" in unwrapped(done.output)
    assert "--seq-len takes whole numbers from 2 on" in unwrapped(
        whole_command("--seq-len", "1").output
    )


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ([(8, 300), (8, 500), (16, 300)], ["V, at S = 8", "S, at V = 300"]),
        ([(8, 300), (16, 300)], ["S, at V = 300"]),
        ([(8, 300)], ["V, at S = 8"]),
    ],
)
def test_plot_has_a_panel_for_what_was_varied(monkeypatch, tmp_path, sizes, axes):
    results = profile(sizes, LINEAR)
    for case in results["cases"]:
        if case["provider"] == "eager_float":
            case.update(peak_bytes=None, run=False, derived_bytes=case["peak_bytes"])
        if case["provider"] == "eager":
            case.update(peak_bytes=None, run=False)
    drawn = []
    legend = "matplotlib.figure.Figure.legend"
    monkeypatch.setattr(legend, lambda self, *_, **__: drawn.extend(self.axes))
    plot_profile(results, tmp_path / "linear.png")
    assert [panel.get_xlabel() for panel in drawn] == [f"{axis}, log scale" for axis in axes]
    assert drawn[0].get_legend_handles_labels()[1] == [
        *("eager", "eager_float", "fused", "fused, its chunk", "1.25 chunk_bytes + 8 MiB")
    ]


def test_table_fits_80_columns():
    results = profile([(8, 300)], LINEAR)
    for case in results["cases"]:
        case.update(length=10 * 2048, vocabulary=256000, peak_bytes=None, derived_bytes=2**37)
    assert "…" not in printed(table(results), caption(results))
