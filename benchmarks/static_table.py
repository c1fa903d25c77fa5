"""The table of what the kernels' machine code costs: `static_gpu.py --sass FILE`.

For one launch of each kernel that streams logits, as tiers.py chooses it for a target (sm_90):

    instructions      of a thread a logit, in each pass over the logits: of the innermost loop, over
                      the logits that it loads; in registers, of the whole kernel
    in_flight         16-byte loads of a thread that are issued before the first of them is used
    barriers, fences  BAR, and MEMBAR, in the whole kernel
    registers, spill_bytes of a thread
"""

import json
from pathlib import Path
from typing import Any

from wmtp.benchmarks.sass import disassemble, loads_in_flight, passes, streamed_bytes
from wmtp.benchmarks.static_compile import compile_variant, cuda_usage
from wmtp.benchmarks.static_variants import FORMS, ITEMSIZE, Variant, variants

# (kernel, weights, dtype, V) that stand for the others, H = 4.
SHOWN = [
    ("register known", "fp32", 32000),
    ("register known", "bf16", 8000),
    ("register excess", "fp32", 8000),
    ("online known forward", "bf16", 1000),
    ("online known", "bf16", 32000),
    ("online known", "bf16", 128256),
    ("online known", "fp32", 128256),
    ("online excess", "bf16", 32000),
    ("partial", "bf16", 50257),
    ("row_gradient", "bf16", 1000),
    ("scale", "bf16", 0),
]
# And with what logits and losses may have besides, beside the plain ones above.
SHOWN += [
    (f"{name} {form}", dtype, vocabulary)
    for form in FORMS
    for name, dtype, vocabulary in (
        ("register known", "fp32", 8000),
        ("register known", "bf16", 8000),
        ("online known", "bf16", 32000),
        ("row_gradient", "bf16", 50257),
    )
]


def row_of(variant: Variant, target: str) -> dict[str, Any]:
    """A line of the table."""
    binary = compile_variant(variant, target)
    code = disassemble(binary.asm["cubin"])
    usage = cuda_usage(binary)
    in_registers = variant.launch.tier in ("row", "token")
    loops = [code] if in_registers else passes(code)
    itemsize = ITEMSIZE[variant.dtype]
    return {
        "kernel": variant.name,
        "dtype": variant.dtype,
        "V": variant.vocabulary,
        "threads": 32 * variant.launch.num_warps,
        "registers": usage["registers"],
        "spill_bytes": usage["spill_bytes"],
        "instructions": [round(itemsize * len(each) / streamed_bytes(each), 1) for each in loops],
        "in_flight": [loads_in_flight(each) for each in loops],
        "barriers": sum(each.opcode.startswith("BAR") for each in code),
        "fences": sum(each.opcode.startswith("MEMBAR") for each in code),
    }


def table(modules: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """A row for each of SHOWN."""
    found: dict[tuple[str, str, int], Variant] = {}
    for variant in variants(modules, target, once=False):
        key = (variant.name, variant.dtype, variant.vocabulary)
        if key in SHOWN and variant.constants.get("H", 4) == 4:
            found.setdefault(key, variant)
    return [row_of(found[key], target) for key in SHOWN if key in found]


def add_table(file: Path, version: str, rows: list[dict[str, Any]]) -> None:
    """Put this Triton's beside those that are there; a line a kernel."""
    there = json.loads(file.read_text()) if file.exists() else {}
    there[version] = rows
    tables = [
        f'"{version}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"
        for version, rows in sorted(there.items())
    ]
    file.write_text("{\n" + ",\n".join(tables) + "\n}\n")
