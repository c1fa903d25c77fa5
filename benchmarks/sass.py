"""What the machine code of the kernels costs, read from its disassembly, without a GPU.

    build/triton-3.9.0/bin/python -m benchmarks.static_gpu --sass benchmarks/results/sass.json

For one launch of each kernel that streams logits, as tiers.py chooses it for a target (sm_90):

    instructions      of a thread a logit, in each pass over the logits: of the innermost loop, over
                      the logits that it loads; in registers, of the whole kernel
    in_flight         16-byte loads of a thread that are issued before the first of them is used
    barriers, fences  BAR, and MEMBAR, in the whole kernel
    registers, spill_bytes of a thread

The tool is NVIDIA's, out of Triton's wheel.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from wmtp.benchmarks.static_compile import compile_variant, cuda_usage
from wmtp.benchmarks.static_variants import ITEMSIZE, Variant, variants

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


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    opcode: str  # LDG.E.128.EF
    operands: str

    def registers(self) -> set[int]:
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)}

    def lanes(self) -> int:
        """Registers of four bytes that an access moves."""
        found = re.search(r"\.(64|128)\b", self.opcode)
        return int(found[1]) // 32 if found else 1


def disassemble(cubin: bytes) -> list[Instruction]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """
    >>> parse("/*0010*/  @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0001 */")
    [Instruction(address=16, opcode='LDG.E.128', operands='R4, [R2.64]')]
    """
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    return [Instruction(int(at, 16), *rest) for at, *rest in re.findall(line, text)]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Whatever a branch backwards spans, and no other."""
    spans = [
        (int(found[1], 16), branch.address)
        for branch in code
        if branch.opcode.startswith("BRA")
        and (found := re.search(r"0x([0-9a-f]+)", branch.operands))
        and int(found[1], 16) < branch.address
    ]
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    return [[each for each in code if a <= each.address <= b] for a, b in sorted(set(inner))]


def loads_in_flight(code: list[Instruction]) -> int:
    """Global loads, of the widest there are, before the first use of any of them."""
    loads = [each for each in code if each.opcode.startswith("LDG")]
    if not loads:
        return 0
    widest = max(each.lanes() for each in loads)
    pending: set[int] = set()
    count = 0
    for each in code:
        if each.opcode.startswith("LDG") and each.lanes() == widest:
            first = int(re.findall(r"\bR(\d+)\b", each.operands)[0])
            pending |= set(range(first, first + widest))
            count += 1
        elif pending & each.registers():
            return count
    return count


def row_of(variant: Variant, target: str) -> dict[str, Any]:
    """A line of the table."""
    binary = compile_variant(variant, target)
    code = disassemble(binary.asm["cubin"])
    usage = cuda_usage(binary)
    in_registers = variant.launch.tier in ("row", "token")
    passes = [code] if in_registers else list(filter(_streams, innermost_loops(code)))
    itemsize = ITEMSIZE[variant.dtype]
    return {
        "kernel": variant.name,
        "dtype": variant.dtype,
        "V": variant.vocabulary,
        "threads": 32 * variant.launch.num_warps,
        "registers": usage["registers"],
        "spill_bytes": usage["spill_bytes"],
        "instructions": [round(itemsize * len(each) / _streamed(each), 1) for each in passes],
        "in_flight": [loads_in_flight(each) for each in passes],
        "barriers": sum(each.opcode.startswith("BAR") for each in code),
        "fences": sum(each.opcode.startswith("MEMBAR") for each in code),
    }


def _streamed(code: list[Instruction]) -> int:
    """Bytes that a thread loads by 16: the compiler may have unrolled a loop."""
    return 16 * sum(each.opcode.startswith("LDG") and each.lanes() == 4 for each in code)


def _streams(loop: list[Instruction]) -> bool:
    """The loop that fills with zeros does not."""
    return _streamed(loop) > 0


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
