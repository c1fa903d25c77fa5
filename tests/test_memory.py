"""Peak bytes, and `wmtp profile`: what is measured, what does not fit, the outputs."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from wmtp.benchmarks import memory
from wmtp.benchmarks.memory import (
    GIBI,
    MEBI,
    SPARE,
    Setting,
    allowed_bytes,
    available_bytes,
    caption,
    chunk_scratch_bytes,
    loss_peak_bytes,
    needed_bytes,
    peak_bytes,
    profile,
    scratch_bytes,
    sweep,
    table,
    write_snapshot,
)
from wmtp.benchmarks.plot import plot_profile
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import LOGITS, absent
from wmtp.cli.app import app

SMALL = Setting(2, torch.bfloat16, "cpu", "cpu")
LINEAR = SMALL._replace(dim=64, chunk_bytes=MEBI)
BOTH = "forward+backward"
SHAPE = (1, 64, 2, 1000)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds a shape."""
    monkeypatch.setattr(memory, "absent", lambda _: {"compiled": "no time", "cce": "?"})


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def failing(error, provider, vocabulary):
    """`loss_peak_bytes`, which for one provider at one vocabulary raises."""

    def peak(name, direction, shape, *rest, **options):
        if (name, shape[-1]) == (provider, vocabulary):
            raise error
        return loss_peak_bytes(name, direction, shape, *rest, **options)

    return peak


def peaks(results):
    return {
        (case["vocabulary"], case["direction"], case["provider"]): case["peak_bytes"]
        for case in results["cases"]
    }


def printed(*parts):
    text = io.StringIO()
    Console(file=text, width=80).print(*parts)
    return text.getvalue()


def unwrapped(text):
    return " ".join(re.sub("[│╭╮╰╯─]", "", text).split())


def command(*arguments):
    small = ("--vocab", "300,500", "--seq-len", "8", "--horizon", "2")
    return CliRunner().invoke(app, ["profile", *small, *map(str, arguments)])


def test_every_vocabulary_direction_and_provider_has_its_peak(uncompiled):
    parts = []
    results = profile(sweep([100, 1000], [16]), SMALL, parts.append)
    assert [{case["vocabulary"] for case in part["cases"]} for part in parts] == [{100}, {1000}]
    headings = ["eager_float" in printed(table(part, part is parts[0])) for part in parts]
    assert headings == [True, False]
    assert results["absent"] == {"compiled": "no time"}
    columns = {column.header: list(column.cells) for column in table(results).columns}
    directions = ["  forward", "  forward+backward", "  inplace"]
    assert columns["V"] == ["100: 0.0 MiB", *directions, "1000: 0.1 MiB", *directions]
    assert [bool(cell) for cell in columns["fused_inplace"]] == [False, False, False, True] * 2
    assert [bool(cell) for cell in columns["eager"]] == [False, True, True, False] * 2
    assert not any(columns["compiled"])
    expected = loss_peak_bytes("eager_float", "forward", (1, 16, 2, 1000), torch.bfloat16, "cpu")
    assert peaks(results)[1000, "forward", "eager_float"] == expected
    assert columns["eager_float"][5] == f"{expected / (16 * 2 * 1000 * 2):.3f}"
    assert "absent: compiled, no time" in printed(caption(results))


@pytest.mark.skipif("compiled" in absent(LOGITS), reason="torch.compile cannot run here")
def test_compiled_is_measured_at_its_shape_without_what_compiling_takes():
    peak = loss_peak_bytes("compiled", "forward+backward", SHAPE, torch.float32, "cpu")
    logits_bytes = 64 * 2 * 1000 * 4
    assert logits_bytes <= peak < 3 * logits_bytes
    again = loss_peak_bytes("compiled", "forward+backward", SHAPE, torch.float32, "cpu")
    assert again == peak


def test_where_torch_compile_fails_it_is_absent_with_the_reason(monkeypatch):
    error = RuntimeError("InductorError: no Python.h\nand much more")
    monkeypatch.setattr(memory, "absent", lambda _: {})
    monkeypatch.setattr(memory, "loss_peak_bytes", failing(error, "compiled", 1024))
    results = profile(sweep([100], [16]), SMALL)
    assert results["absent"] == {"compiled": "torch.compile fails: InductorError: no Python.h"}
    assert {provider for _, _, provider in peaks(results)} == {
        *("eager", "eager_float", "fused", "fused_inplace")
    }


def test_what_would_not_fit_into_main_memory_is_not_run(uncompiled, monkeypatch):
    ran = []

    def peak(provider, direction, shape, *rest, **options):
        ran.append((direction, provider, shape[-1]))
        return loss_peak_bytes(provider, direction, shape, *rest, **options)

    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
    logits_bytes = 512 * 2 * 5000 * 2
    # The logits twice, and a peak of three or four times the logits, not of six.
    free = SPARE + (2 + 5) * logits_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    results = profile(sweep([100, 5000], [512]), SMALL)
    unfit = [key for key, value in peaks(results).items() if value is None]
    assert unfit == [(5000, "forward+backward", "eager_float")]
    assert ("forward+backward", "eager_float", 5000) not in ran
    assert ("forward+backward", "eager", 5000) in ran
    text = unwrapped(printed(table(results), caption(results)))
    assert "does not fit: not run." in text
    assert f"of {free / GIBI:.1f} GiB free, 0.5 of them spared" in text


def test_compiled_is_expected_to_take_what_eager_float_takes(monkeypatch):
    def peak(provider, direction, *rest, **options):
        return {"eager_float": 600, "compiled": 100}.get(provider, 300)

    monkeypatch.setattr(memory, "absent", lambda _: {})
    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
    needs = {
        (case["direction"], case["provider"]): case["needed_bytes"]
        for case in profile(sweep([5000], [16]), SMALL)["cases"]
    }
    for direction in ("forward", "forward+backward"):
        assert needs[direction, "compiled"] == needs[direction, "eager_float"]
        assert needs[direction, "compiled"] > needs[direction, "eager"]


@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 16), (torch.float32, 300)])
def test_the_need_is_foreseen_from_above_and_not_by_far(uncompiled, dtype, length):
    sizes = sweep([700, 9000], [length])
    for case in profile(sizes, SMALL._replace(dtype=dtype))["cases"]:
        taken = case["peak_bytes"] + 2 * case["logits_bytes"]
        scratch = 4 * case["vocabulary"] * torch.get_num_threads()
        assert taken <= case["needed_bytes"] <= 1.2 * taken + scratch
    case = Case("memory", (1, 16, 2, 1000), "bfloat16", BOTH, "fused")
    assert needed_bytes(case, 0.0) == 1000 * (16 * 2 * 2 * 2 + 4 * torch.get_num_threads())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: you")],
)
def test_running_out_of_memory_leaves_one_cell_empty(uncompiled, monkeypatch, error):
    monkeypatch.setattr(memory, "loss_peak_bytes", failing(error, "fused", 5000))
    results = profile(sweep([100, 5000], [16]), SMALL)
    assert [key for key, value in peaks(results).items() if value is None] == [
        (5000, "forward", "fused"),
        (5000, "forward+backward", "fused"),
    ]
    text = unwrapped(printed(table(results), caption(results)))
    assert "does not fit: ran out of cpu memory" in text
    assert "not run" not in text


def test_any_other_error_is_not_taken_for_a_lack_of_memory(uncompiled, monkeypatch):
    error = RuntimeError("a bug")
    monkeypatch.setattr(memory, "loss_peak_bytes", failing(error, "fused", 5000))
    with pytest.raises(RuntimeError, match="a bug"):
        profile(sweep([5000], [16]), SMALL)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_backend_is_that_of_the_fused_losses(backend):
    def peak(provider, direction):
        shape = (1, 8, 2, 300)
        return loss_peak_bytes(provider, direction, shape, torch.float32, "cpu", backend=backend)

    logits_bytes = 8 * 2 * 300 * 4
    if backend == "eager":
        assert peak("fused", "forward+backward") > 1.9 * logits_bytes
    else:
        assert peak("fused", "forward") < 0.5 * logits_bytes
    assert peak("fused_inplace", "inplace") >= 0


def test_a_backend_that_cannot_run_is_one_line(on_cpu, monkeypatch):
    monkeypatch.setattr("wmtp.backends.cpu.unavailable", lambda: "no compiler: get one")
    missing = command("--backend", "cpu")
    unknown = command("--backend", "cuda")
    assert missing.exit_code == unknown.exit_code == 1
    assert missing.output == "error: backend 'cpu' is not available: no compiler: get one\n"
    assert re.match("error: backend must be .*'triton'.*, got 'cuda'", unknown.output)


def test_a_snapshot_needs_cuda_and_says_so(on_cpu, tmp_path):
    done = command("--snapshot", tmp_path / "new" / "snapshot.pickle")
    assert done.exit_code == 2
    text = unwrapped(done.output)
    assert "needs a CUDA device: leave it out, the table is exact on the CPU" in text
    assert not (tmp_path / "new").exists()


def test_a_snapshot_holds_an_eager_and_a_fused_step(monkeypatch, tmp_path):
    # Without CUDA there is nothing to record; what is called around which steps is the same.
    happened = []

    def peak(provider, direction, shape, *rest, **options):
        happened.append((provider, direction, shape))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all": happened.append(f"record {enabled}"),
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", happened.append)
    write_snapshot(tmp_path / "snapshot.pickle", (16, 300), SMALL)
    assert happened == [
        "record all",
        ("eager", "forward+backward", (1, 16, 2, 300)),
        ("fused", "forward+backward", (1, 16, 2, 300)),
        str(tmp_path / "snapshot.pickle"),
        "record None",
    ]


def test_command_tabulates_draws_and_writes(uncompiled, on_cpu, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    json_file, plot_file = tmp_path / "new" / "profile.json", tmp_path / "profile.png"
    done = command("--json", json_file, "--plot", plot_file, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "logits [1, 8, 2, V], float32, cpu, backend cpu" in unwrapped(done.output)
    written = json.loads(json_file.read_text())
    assert re.match(
        "OMP_NUM_THREADS=1 .*wmtp profile --vocab 300,500 --seq-len 8 --horizon 2 "
        "--dtype float32 --backend auto$",
        written["command"],
    )
    assert written["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert written["cases"][0]["logits_bytes"] == 8 * 2 * 300 * 4
    assert len(written["cases"]) == 2 * 7
    assert plot_file.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_what_is_no_vocabulary():
    for vocab in ("12,x", "0", ""):
        done = CliRunner().invoke(app, ["profile", "--vocab", vocab])
        assert done.exit_code == 2
        assert "--vocab takes positive whole numbers" in unwrapped(done.output)


def test_table_fits_80_columns_and_plot_says_what_does_not_fit(uncompiled, monkeypatch, tmp_path):
    results = profile(sweep([300, 256000], [2]), SMALL._replace(heads=1))
    for case in results["cases"]:
        case.update(vocabulary=1000 * case["vocabulary"], logits_bytes=1000 * case["logits_bytes"])
        if (case["provider"], case["direction"]) == ("eager", "forward+backward"):
            case.update(peak_bytes=None, run=True)
    text = printed(table(results), caption(results))
    assert "…" not in text
    assert "256000000: 976.6 MiB" in text
    labels = []
    legend = "matplotlib.figure.Figure.legend"
    monkeypatch.setattr(
        legend, lambda self, *_, **__: labels.extend(self.axes[0].get_legend_handles_labels()[1])
    )
    plot_profile(results, tmp_path / "profile.png")
    assert labels == [
        *("the logits", "eager, does not fit:\n300000, 256000000", "eager_float"),
        *("fused", "fused_inplace"),
    ]


def test_the_profiler_itself_says_nothing(capfd):
    peak_bytes(lambda: torch.empty(10))
    assert "profiler_st" not in capfd.readouterr().err


# --- bytes ----------------------------------------------------------------------------------------


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


# --- linear ---------------------------------------------------------------------------------------


def whole_command(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


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


@pytest.mark.parametrize("provider", ["eager", "eager_float"])
@pytest.mark.parametrize("direction", [BOTH, "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_derived_is_what_is_measured(provider, direction, dtype):
    setting = LINEAR._replace(dtype=dtype)
    (case,) = found(profile([(256, 20000)], setting), provider, direction)
    assert case["derived_bytes"] == case["peak_bytes"]
    # Few rows, where the moment of the peak may change with V: never more.
    (case,) = found(profile([(4, 20000)], setting), provider, direction)
    assert 0 < case["derived_bytes"] <= case["peak_bytes"]


def ran(monkeypatch, room):
    """(provider, V) of the cases that are run where there is so much room beyond the inputs."""
    calls = []

    def peak(provider, direction, shape, *rest, **options):
        calls.append((provider, shape[-1]))
        return loss_peak_bytes(provider, direction, shape, *rest, **options)

    inputs = (256 * 2 + 20000) * 64 * 2
    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
    monkeypatch.setattr(memory, "available_bytes", lambda: SPARE + inputs + room)
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

    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
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

    monkeypatch.setattr(memory, "loss_peak_bytes", peak)
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
    assert plot_file.read_bytes().startswith(b"\x89PNG")


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
