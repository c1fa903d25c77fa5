"""What Triton's compiler makes of the kernels: no spills, 16-byte accesses, enough in flight.

Here one of each kind for one dtype and card; `python -m benchmarks.static_gpu --check` compiles
all, and so does CI.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from wmtp.benchmarks import static_gpu

# static_gpu's command, which must not import `wmtp` before it, on fewer kernels.
ONE_OF_EACH_KIND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import static_gpu
every_variant = static_gpu.variants

def one_of_each_kind(*arguments):
    found = set()
    for variant in every_variant(*arguments):
        how = [variant.constants.get(name) for name in ("LISTED", "SPLITS")]
        kind = (variant.kernel, variant.dtype, variant.launch.tier, variant.launch.num_ctas, *how)
        if kind not in found:
            found.add(kind)
            yield variant

static_gpu.variants = one_of_each_kind
static_gpu.main()
"""


@functools.cache
def report():
    """In a process of its own: in this one Triton may be its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        file, cubins = Path(folder) / "report.json", Path(folder) / "cubins"
        arguments = ["--check", "--dtype", "bf16", "--json", file, "--cubins", cubins, "cuda:90"]
        folder_of_command = Path(static_gpu.__file__).parent
        done = subprocess.run(
            [sys.executable, "-c", ONE_OF_EACH_KIND, *map(str, [folder_of_command, *arguments])],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        kept = {path.stem: path.stat().st_size for path in cubins.glob("*.cubin")}
        assert len(kept) == len(list(cubins.glob("*.json")))
        return json.loads(file.read_text())["kernels"], kept


def test_every_tier_is_there_and_passes_the_check():
    rows, cubins = report()
    assert {row["tier"] for row in rows} == {"token", "row", "online", None}
    assert {row["num_ctas"] for row in rows} >= {1, 2, 4, 8, 16}
    assert cubins
    assert all(cubins.values())


def test_the_report_has_what_it_promises():
    promised = {
        *("name", "target", "dtype", "registers", "spill_bytes", "shared_bytes", "streams_logits"),
        *("main_loop_load_bytes", "main_loop_store_bytes", "tier", "num_ctas", "occupancy"),
    }
    for row in report()[0]:
        assert promised <= row.keys()
        assert row["registers"] > 0
        assert row["occupancy"] > 0


GOOD = {
    "name": "row_gradient", "spill_bytes": 0, "flushes": True, "streams_logits": True,
    "main_loop_load_bytes": [16], "main_loop_store_bytes": [16],
    "in_flight": 20_000, "needed": 15_227,
}  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "complaint"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"name": "weights"}, "takes denormal weights for 0"),
        ({"main_loop_load_bytes": [2, 16]}, "loads logits by [2, 16] bytes"),
        ({"main_loop_load_bytes": []}, "loads logits by [] bytes"),
        ({"main_loop_store_bytes": [4]}, "stores logits by [4] bytes"),
        ({"main_loop_store_bytes": []}, None),
        ({"in_flight": 10_000}, "has 10000 of 15227 bytes in flight"),
        ({"streams_logits": False, "main_loop_load_bytes": [], "in_flight": None}, None),
    ],
)
def test_check(worse, complaint):
    assert static_gpu.complaint({**GOOD, **worse}) == complaint
