"""PTX as the machine wants it: blocks of instructions, entered at the top and left below."""

import re
from dataclasses import dataclass, field

# What a block ends with: lanes part there, wait, or are gone.
ENDS = ("bra", "ret", "exit", "bar.sync", "barrier.sync", "barrier.cluster.wait")
WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]  # a vector is one: {%r1, %r2}
    guard: str | None = None  # %p1, or !%p1
    line: str = ""  # of the source

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.line} {guard}{self.opcode} {', '.join(self.operands)}"

    def ends_block(self) -> bool:
        return any(self.opcode == end or self.opcode.startswith(end + ".") for end in ENDS)


@dataclass
class Kernel:
    name: str
    parameters: list[str]  # their types
    registers: dict[str, int]  # widths, by the name before the number
    threads: int
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # the block that begins there
    shared: set[str] = field(default_factory=set)  # names of the shared memory

    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]


def parse(text: str) -> Kernel:
    """The one kernel of a module of Triton's."""
    code = re.sub(r"//[^\n]*", "", text)
    head, body = re.split(r"\n\{", code, maxsplit=1)
    body = body.split("\n}", 1)[0]
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", head, re.S)
    if entry is None:
        raise ValueError("no kernel in this PTX")
    parameters = re.findall(r"\.param\s+\.(\w+)", entry[2])
    registers = {
        name: WIDTHS[kind] for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<", body)
    }
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    names = set(re.findall(r"\.shared[^;\n]*?(\w+)\[\]", head))
    blocks, labels = _blocks(body, _files(text))
    return Kernel(
        name=entry[1],
        parameters=parameters,
        registers=registers,
        threads=int(threads[1]) if threads else 0,
        blocks=blocks,
        labels=labels,
        shared=names,
    )


def _files(text: str) -> dict[str, str]:
    paths = re.findall(r"\.file\s+(\d+)\s+\"([^\"]+)\"", text)
    return {number: path.rsplit("/", 1)[-1] for number, path in paths}


def _blocks(body: str, files: dict[str, str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    line = ""
    for statement in _statements(body):
        if statement.endswith(":"):
            if "__tmp" in statement:  # the debugger's
                continue
            if blocks[-1]:
                blocks.append([])
            labels[statement[:-1]] = len(blocks) - 1
        elif statement.startswith(".loc"):
            number, row = statement.split()[1:3]
            # Line 0 is the compiler's own; the line before it says more.
            line = line if row == "0" else f"{files.get(number, number)}:{row}"
        elif not statement.startswith("."):
            instruction = _instruction(statement, line)
            blocks[-1].append(instruction)
            if instruction.ends_block():
                blocks.append([])
    return blocks, labels


def _statements(body: str) -> list[str]:
    """Labels with their colon, .loc lines, and what ends with a semicolon, without it."""
    found: list[str] = []
    open_ended = False
    for row in map(str.strip, body.split("\n")):
        if row.startswith(".loc") or re.fullmatch(r"\$?\w+:", row):
            found.append(row)
            open_ended = False  # no instruction goes on beyond one of these
            continue
        first, *others = row.split(";")
        if open_ended:
            found[-1] += " " + first
        else:
            found.append(first)
        found += others
        open_ended = True
    return [text.strip() for text in found if text.strip()]


def _instruction(statement: str, line: str) -> Instruction:
    guard = None
    if statement.startswith("@"):
        guard, statement = statement[1:].split(None, 1)
    opcode, _, rest = statement.partition(" ")
    if "\t" in opcode:
        opcode, _, rest = statement.partition("\t")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest.strip())
    return Instruction(opcode, tuple(operand.strip() for operand in operands), guard, line)


def members(operand: str) -> list[str]:
    """Of a vector; of a scalar itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """(base, offset) of [base + offset]."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    return base, int(offset or 0)
