"""What the launchers have compiled: one binary a variant, whatever a step varies; and what is in
the PTX of some: sums that every lane agrees on, barriers where threads share memory.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")


@functools.cache
def report():
    """(launches, {name: PTX}), from a process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment["TRITON_CACHE_DIR"] = name
        command = [sys.executable, Path(__file__).parent / "support" / "compiled.py", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        ptx = {path.stem: path.read_text() for path in folder.glob("*.ptx")}
        return json.loads((folder / "launches.json").read_text()), ptx


def test_a_step_compiles_nothing_that_an_earlier_one_has():
    """Temperatures, normalizers and integers of any value, tensors of any alignment: launches that
    agree in constants, options and element types agree in everything that is specialised."""
    binaries, launches = defaultdict(set), report()[0]
    for launch in launches:
        parameters = list(zip(launch["parameters"], launch["specialization"], strict=True))
        constants = [(name, detail) for name, (kind, detail) in parameters if kind == "constexpr"]
        pointers = [(name, kind) for name, (kind, _) in parameters if kind.startswith("*")]
        variant = (launch["kernel"], constants, pointers, sorted(launch["options"].items()))
        binaries[str(variant)].add(str(launch["specialization"]))
    assert {launch["kernel"] for launch in launches} == {
        *("weights_kernel", "register_kernel", "online_kernel", "finish_kernel"),
        *("row_gradient_kernel", "scale_kernel"),
    }
    assert len(launches) > 10 * len(binaries)
    assert {variant: found for variant, found in binaries.items() if len(found) > 1} == {}


def test_logits_and_gradients_are_known_to_be_aligned():
    for launch in report()[0]:
        for name, (_, detail) in zip(launch["parameters"], launch["specialization"], strict=True):
            assert name not in ("logits_ptr", "grad_ptr") or detail == "D"


def test_fusing_products_into_sums_is_asked_for():
    """Triton 3.10 no longer does so by itself."""
    assert all(launch["options"]["enable_fp_fusion"] is True for launch in report()[0])


def instructions(ptx):
    """(opcode, destination, sources) of each line that writes one register."""
    for line in ptx.splitlines():
        if found := re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(%\w+)[^,]*,\s*(.*);", line):
            yield found[1], found[2], re.findall(r"%\w+", found[3])


def unrounded_sums(ptx):
    """Additions of what another lane holds to a product that is not rounded before."""
    made_by, found = {}, []
    for opcode, destination, sources in instructions(ptx):
        makers = [made_by.get(source, "") for source in sources]
        if any(maker.startswith("shfl") for maker in makers):
            fused = opcode.startswith("fma") and "f32" in opcode
            # The assembler may fuse these two by itself.
            fusible = opcode == "add.f32" and "mul.f32" in makers
            if fused or fusible:
                found.append((opcode, makers))
        is_copy = opcode in ("mov.b32", "mov.f32") and len(makers) == 1
        made_by[destination] = makers[0] if is_copy else opcode
    return found


def test_products_are_rounded_before_lanes_add_them_up():
    """Fused into a reduction's first addition they would be rounded in one lane of two."""
    ptx = report()[1]
    assert unrounded_sums(ptx.pop("control"))
    assert {"online_kernel 1", "partial_kernel 3", "finish_kernel 8"} <= ptx.keys()
    assert {name: found for name, text in ptx.items() if (found := unrounded_sums(text))} == {}


def test_in_place_all_threads_of_a_warp_have_read_before_one_writes():
    ptx = report()[1]["register_kernel"]
    assert ".reqntid 32\n" in ptx
    reads = [found.start() for found in re.finditer(r"ld\.global[.\w]*\.(b16|v4\.b32) ", ptx)]
    writes = [found.start() for found in re.finditer(r"st\.global[.\w]*\.(b16|v4\.b32) ", ptx)]
    assert reads
    assert writes
    assert any(max(reads) < found.start() < min(writes) for found in re.finditer(r"bar\.", ptx))


def test_scaling_moves_16_bytes_an_access():
    ptx = report()[1]["scale_kernel"]
    for kind in ("ld", "st"):
        widths = re.findall(rf"{kind}\.global[.\w]*?\.((?:v4\.)?b\d+) ", ptx)
        assert widths.count("v4.b32") == 2
        assert set(widths) <= {"v4.b32", "b16", "b32"}  # an edge, and the factor
