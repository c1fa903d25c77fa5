"""What Triton's compiler makes of the kernels for cards that are not here.

    python tests/test_kernels_compile.py [TARGET ...]      one JSON object a line and variant

needs Triton alone (>= 3.6, no torch, no GPU), so another version is checked from a venv of its own.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ODD, SHORT = 50257, 1000
HEADS = 4


def load_kernels():
    """wmtp.kernels' modules, from their folder: `wmtp` itself would need torch."""
    if importlib.util.find_spec("torch") is None:  # then only its names are needed
        sys.modules["torch"] = types.ModuleType("torch")
        sys.modules["torch"].__dict__.update(Tensor=object, device=object)
    folder = Path(__file__).parents[1] / "kernels" / "gpu"
    for name, path in (("wmtp", []), ("wmtp.kernels", [str(folder)])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = path
    names = ("rows", "token_kernel", "gradient_kernel", "next_token_kernel")
    return [importlib.import_module(f"wmtp.kernels.{name}") for name in names]


def variants(token, gradient, next_token):
    """(name, dtype, V, kernel, its constexprs but BLOCK): what the launchers can ask for."""
    weightings = {
        "uniform": (token.UNIFORM, False),
        "given": (token.GIVEN, False),
        "excess": (token.EXCESS, False),
        "signed": (token.EXCESS, True),
    }
    for dtype in ITEMSIZE:
        for vocabulary in (ODD, SHORT):
            yield "next_token_ce", dtype, vocabulary, next_token.next_token_ce_kernel, {}
            for weighting, (code, signed) in weightings.items():
                for shared in (False, True):
                    if weighting != "excess" and (shared or vocabulary == SHORT):
                        continue  # the weighting is no part of the stream
                    yield (
                        f"token_loss {weighting}" + " shared" * shared,
                        dtype,
                        vocabulary,
                        token.token_loss_kernel,
                        {
                            "H": HEADS,
                            "SHARED_HEADS": shared,
                            "WEIGHTING": code.value,
                            "SIGNED": signed,
                            "NORMALIZE": weighting != "given",
                        },
                    )
            for shared, in_phase in ((False, True), (True, True), (False, False)):
                if vocabulary == SHORT and not in_phase:
                    continue
                yield (
                    "row_gradient" + " shared" * shared + " out of phase" * (not in_phase),
                    dtype,
                    vocabulary,
                    gradient.row_gradient_kernel,
                    {"H": HEADS, "SHARED_HEADS": shared, "IN_PHASE": in_phase},
                )


def compiled(kernel, dtype, constexprs, target, num_warps):
    """As the launcher has it compiled: aligned pointers, and no integer specialised."""
    import triton
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            of_logits = name in ("logits_ptr", "grad_ptr")
            signature[name] = (
                f"*{dtype if of_logits else 'i64' if name == 'target_ptr' else 'fp32'}"
            )
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif name == "temperature":
            signature[name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{name} would make a binary for every V"
            signature[name] = "i64" if "stride" in name else "i32"
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def report(targets):
    """One row a variant and target; see the tests for what the columns mean."""
    from triton.backends.compiler import GPUTarget

    rows, *kernels = load_kernels()
    for target in targets:
        backend, arch = target.split(":")
        warp = 64 if backend == "hip" else 32
        gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, warp)
        for name, dtype, vocabulary, kernel, constexprs in variants(*kernels):
            block, num_warps = rows.launch_shape(vocabulary, ITEMSIZE[dtype], warp)
            binary = compiled(kernel, dtype, {**constexprs, "BLOCK": block}, gpu, num_warps)
            usage = cuda_usage(binary) if backend == "cuda" else hip_usage(binary)
            yield {
                "kernel": name,
                "target": target,
                "dtype": dtype,
                "vocabulary": vocabulary,
                "block": block,
                "threads": num_warps * warp,
                **usage,
            }


def cuda_usage(binary):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    access = r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b"
    loads, stores = loop_widths(binary.asm["ptx"], r"bra(?:\.uni)?\s+(\S+);", access)
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "loop_load_bytes": loads,
        "loop_store_bytes": stores,
    }


def hip_usage(binary):
    text = binary.asm["amdgcn"]
    access = r"\b(?:global|buffer)_(load|store)_(?:dwordx(\d)|(?:[us]?(\w+)))\b"
    loads, stores = loop_widths(text, r"s_c?branch\w*\s+(\S+)", access)
    values = {
        key: int(value) for key, value in re.findall(r"\.(\w+_count|private_\w+):\s+(\d+)", text)
    }
    return {
        "registers": values["vgpr_count"],
        "spill_bytes": values["private_segment_fixed_size"]
        + 4 * (values["vgpr_spill_count"] + values["sgpr_spill_count"]),
        "loop_load_bytes": loads,
        "loop_store_bytes": stores,
    }


def loop_widths(text, branch, access):
    """Sorted bytes of the global loads, and of the stores, that stand in innermost loops."""
    lines = text.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if ":" in line}
    spans = {
        (labels[found[1]], end)
        for end, line in enumerate(lines)
        if (found := re.search(branch, line)) and labels.get(found[1], end) < end
    }
    innermost = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    narrow_words = {"dword": 4, "short": 2, "byte": 1}
    widths: dict[str, set[int]] = {"ld": set(), "st": set()}
    for begin, end in innermost:
        for kind, lanes, word in re.findall(access, "\n".join(lines[begin:end])):
            if word in narrow_words or not word:  # AMD: dwordx4, ushort
                size = narrow_words[word] if word else 4 * int(lanes)
            else:
                size = int(lanes or 1) * int(word) // 8
            widths["ld" if kind in ("ld", "load") else "st"].add(size)
    return sorted(widths["ld"]), sorted(widths["st"])


@functools.cache
def compiled_rows():
    """All targets, by two processes: in this one Triton may be its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *half],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for half in (TARGETS[:2], TARGETS[2:])
        ]
        outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    return [json.loads(line) for output in outputs for line in output.splitlines()]


def test_every_variant_compiles_for_every_target_without_spills():
    assert {row["target"] for row in compiled_rows()} == set(TARGETS)
    assert [row for row in compiled_rows() if row["spill_bytes"]] == []


def test_streaming_loops_move_16_bytes_an_access():
    for row in compiled_rows():
        narrow_loads = "out of phase" in row["kernel"]
        assert narrow_loads or row["loop_load_bytes"] == [16], row
        assert row["loop_store_bytes"] == ([16] if "gradient" in row["kernel"] else []), row


def test_two_programs_fit_an_sm():
    """Of 65536 registers: the occupancy that the table of `launch_shape` counts on."""
    for row in compiled_rows():
        if row["target"].startswith("cuda"):
            assert 2 * row["threads"] * row["registers"] <= 65536, row


if __name__ == "__main__":
    for line in report(sys.argv[1:] or TARGETS):
        print(json.dumps(line), flush=True)
