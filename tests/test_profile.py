"""`wmtp profile` of logits: what is measured, what does not fit, the outputs."""

import json
import re

import pytest
import torch

from support.command_line import printed, unwrapped, wmtp
from support.pictures import assert_drawn
from wmtp.benchmarks import profile as sweeps
from wmtp.benchmarks.memory import loss_peak_bytes
from wmtp.benchmarks.plot import plot_profile
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.profile import (
    GIBI,
    SPARE,
    Setting,
    caption,
    needed_bytes,
    profile,
    sweep,
    table,
    write_snapshot,
)
from wmtp.benchmarks.providers import LOGITS, absent

SMALL = Setting(2, torch.bfloat16, "cpu", "cpu")
BOTH = "forward+backward"
SHAPE = (1, 64, 2, 1000)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds a shape."""
    monkeypatch.setattr(sweeps, "absent", lambda _: {"compiled": "no time", "cce": "?"})


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


def command(*arguments):
    small = ("--vocab", "300,500", "--seq-len", "8", "--horizon", "2")
    return wmtp("profile", *small, *arguments)


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
    monkeypatch.setattr(sweeps, "absent", lambda _: {})
    monkeypatch.setattr(sweeps, "loss_peak_bytes", failing(error, "compiled", 1024))
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

    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
    logits_bytes = 512 * 2 * 5000 * 2
    # The logits twice, and a peak of three or four times the logits, not of six.
    free = SPARE + (2 + 5) * logits_bytes
    monkeypatch.setattr(sweeps, "available_bytes", lambda: free)
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

    monkeypatch.setattr(sweeps, "absent", lambda _: {})
    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
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
    monkeypatch.setattr(sweeps, "loss_peak_bytes", failing(error, "fused", 5000))
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
    monkeypatch.setattr(sweeps, "loss_peak_bytes", failing(error, "fused", 5000))
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

    monkeypatch.setattr(sweeps, "loss_peak_bytes", peak)
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
    assert_drawn(plot_file)


def test_command_refuses_what_is_no_vocabulary():
    for vocab in ("12,x", "0", ""):
        done = wmtp("profile", "--vocab", vocab)
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
