"""What Triton's compiler makes of the kernels: no spills, 16-byte accesses, enough in flight.

Here one of each kind for one dtype and card; `make static` compiles all with every Triton, and CI
some of each.
"""

import functools
import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from wmtp.benchmarks import static_compile, static_gpu, static_variants

STREAMS = r"^(register (known|excess)|online (known|excess)|partial|next_token_ce|row_gradient)$"


# The command, again and again: importing what it needs takes longer than to compile some kernels.
COMMANDS = """
import json, sys
from wmtp.benchmarks import static_gpu
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        static_gpu.main()
    except SystemExit as ended:
        assert not ended.code
"""


def check(folder, *commands):
    """Each one's rows, in a process of their own: in this one Triton may be its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    files = [folder / f"report{number}.json" for number in range(len(commands))]
    arguments = [
        ["--check", "--json", str(file), *command, "cuda:90"]
        for file, command in zip(files, commands, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(file.read_text())["kernels"] for file in files]


OTHER = {"key": "of another compiler, or kernel", "row": {"registers": 77}}
SCALE = ("--sample", "1", "--dtype", "bf16", "--only", "^scale", "--known")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of each kind one, given weights, the rows that are put beside known ones, and their file."""
    folder = tmp_path_factory.mktemp("reports")
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(OTHER) + "\n" + '{"key": "cut sh')
    of_each_kind = ("--sample", "1", "--dtype", "bf16", "--only", STREAMS)
    given = ("--only", "weights given weight_mean")
    return *check(folder, of_each_kind, given, (*SCALE, str(file))), file


def test_every_tier_is_there_and_passes_the_check(reports):
    assert {row["tier"] for row in reports[0]} == {"token", "row", "online"}


def test_given_weights_of_an_odd_number_of_heads_compile(reports):
    """LLVM's vectorizer died of a maximum over the heads: of 3, 5 and 7 in weight_mean."""
    assert [row["constants"]["H"] for row in reports[1]] == list(range(1, 9))


def test_the_report_has_what_it_promises(reports):
    promised = {
        *("name", "target", "dtype", "registers", "spill_bytes", "shared_bytes", "streams_logits"),
        *("main_loop_load_bytes", "main_loop_store_bytes", "tier", "occupancy"),
    }
    for row in reports[0]:
        assert promised <= row.keys()
        assert row["registers"] > 0
        assert row["occupancy"] > 0


GOOD = {
    "name": "online known", "spill_bytes": 0, "flushes": True, "streams_logits": True,
    "main_loop_load_bytes": [16], "main_loop_store_bytes": [16], "in_flight": 20_000,
    "needed": 15_227,
}  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "complaint"),
    [
        ({}, None),
        ({"failure": "the compiler died of signal 11"}, "the compiler died of signal 11"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"main_loop_load_bytes": [2, 16]}, "loads logits by [2, 16] bytes"),
        ({"main_loop_load_bytes": []}, "loads logits by [] bytes"),
        ({"main_loop_load_bytes": [2], "name": "online known out of phase"}, None),
        ({"main_loop_store_bytes": [4]}, "stores logits by [4] bytes"),
        ({"main_loop_store_bytes": []}, None),
        ({"in_flight": 10_000}, "has 10000 of 15227 bytes in flight"),
        ({"streams_logits": False, "main_loop_load_bytes": [], "in_flight": None}, None),
        ({"name": "weights given sum"}, "takes denormal weights for 0"),
    ],
)
def test_check(worse, complaint):
    assert static_compile.complaint({**GOOD, **worse}) == complaint


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_compiler_that_dies_is_a_finding_and_not_the_end(jobs):
    def compiled(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            raise ValueError("no such layout\nand more")
        return {"registers": number}

    assert list(static_gpu.in_processes(compiled, range(5), jobs)) == [
        {"registers": 0},
        {"failure": "the compiler died of signal 9"},
        {"failure": "ValueError: no such layout"},
        {"registers": 3},
        {"registers": 4},
    ]


@functools.cache
def every_variant(target):
    return list(static_variants.variants(static_gpu.load_kernels(), target))


def test_every_number_of_heads_dtype_weighting_and_reduction_is_compiled_once():
    every = every_variant("cuda:90")
    assert len({variant.specialisation() for variant in every}) == len(every)
    weights = {v.name.removeprefix("weights ") for v in every if v.name.startswith("weights")}
    assert len(weights) == 12
    for heads in static_variants.HEADS:
        mine = [variant for variant in every if variant.constants.get("H") == heads]
        for reductions in ("token_mean", "weight_mean", "sum"):
            for weighting in ("ones", "given", "later"):
                assert any(v.name == f"weights {weighting} {reductions}" for v in mine)
        for dtype in static_variants.ITEMSIZE:
            names = {variant.name for variant in mine if variant.dtype == dtype}
            for kernel in ("register", "online"):
                for weighting in ("known", "excess"):
                    for shared in ["", " shared"][: 1 + (heads > 1)]:
                        assert f"{kernel} {weighting}{shared}" in names


def test_a_sample_has_one_of_each_kind_and_no_more_than_asked():
    every = [(target, v) for target in static_variants.CARDS for v in every_variant(target)]
    kinds = {variant.kind() for _, variant in every}
    sample = static_variants.sample(every, 100, "3.9.0")
    assert len(kinds) <= len(sample) == 100
    assert {variant.kind() for _, variant in sample} == kinds
    assert {target for target, _ in sample} == set(static_variants.CARDS)
    assert static_variants.sample(every, 100, "3.9.0") == sample
    assert static_variants.sample(every, 100, "3.8.0") != sample
    assert len(static_variants.sample(every, 1, "")) == len(kinds)


def test_the_summary_counts_by_target_and_kernel_and_keeps_other_versions(tmp_path):
    known = {**GOOD, "target": "cuda:90", "registers": 40}
    rows = [
        known,
        {**known, "name": "online excess", "registers": 64, "spill_bytes": 8},
        {**known, "name": "weights given sum", "failure": "died"},
    ]
    file = tmp_path / "summary.json"
    for version in ("3.9.0", "3.6.0"):
        static_gpu.add_summary(file, version, rows, "these")
    static_gpu.add_summary(file, "3.9.0", [{**known, "target": "cuda:80"}], "others")
    found = json.loads(file.read_text())
    assert list(found) == ["3.6.0", "3.9.0"]
    assert list(found["3.9.0"]) == ["cuda:90", "cuda:80"]
    there = static_gpu.summary_there(file, "3.9.0", "cuda:90", "these")
    assert there == {
        "online": {"variants": 2, "failures": 0, "spills": 1, "complaints": 1, "registers": 64},
        "weights": {"variants": 1, "failures": 1, "spills": 0, "complaints": 1, "registers": 40},
    }
    assert len(file.read_text().splitlines()) < 25
    assert static_gpu.summary_there(file, "3.9.0", "cuda:90", "others") is None
    assert static_gpu.summary_there(file, "3.9.0", "cuda:100", "these") is None
    assert static_gpu.summary_there(tmp_path / "none", "3.9.0", "cuda:90", "these") is None


def test_rows_made_before_are_not_made_again(reports, tmp_path):
    *_, (row,), file = reports
    assert row["registers"] != 77
    line = json.loads(file.read_text().splitlines()[-1])
    assert {**row, **line["row"]} == row
    line["row"]["registers"] = 77
    file.write_text(json.dumps(OTHER) + "\n" + json.dumps(line) + "\n")
    ((again,),) = check(tmp_path, (*SCALE, str(file)))
    assert again["registers"] == 77
