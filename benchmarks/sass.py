"""NVIDIA's disassembly of a binary, and what a thread does in it; without a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


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


def streamed_bytes(code: list[Instruction]) -> int:
    """Bytes that a thread loads by 16: the compiler may have unrolled a loop."""
    return 16 * sum(each.opcode.startswith("LDG") and each.lanes() == 4 for each in code)


def passes(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops over the logits: the one that fills with zeros loads nothing."""
    return [loop for loop in innermost_loops(code) if streamed_bytes(loop)]
