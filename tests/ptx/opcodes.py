"""Every instruction of the machine, by its name."""

from typing import TYPE_CHECKING

from ptx import access, convert, floating, integer, warp
from ptx.findings import UnknownError
from ptx.parse import Instruction, Kernel
from ptx.values import Mask, Step, Values

if TYPE_CHECKING:
    from ptx.machine import Machine

GROUPS = (access, convert, floating, integer, warp)


def decode(kernel: Kernel, found: Instruction) -> Step:
    """What it does to the lanes of a mask."""
    unknown = UnknownError(f"the instruction {found.opcode}: {found}")
    for group in GROUPS:
        try:
            step = group.decode(kernel, found)
        except (KeyError, ValueError, IndexError) as error:  # another form of what it knows
            raise unknown from error
        if step is not None:
            return step if found.guard is None else guarded(step, found.guard)
    raise unknown


def guarded(step: Step, guard: str) -> Step:
    def where(machine: "Machine", mask: Mask) -> None:
        chosen = machine.spread(condition(machine, guard))
        if mask is not None:
            chosen = chosen & mask
        if chosen.any():
            step(machine, None if chosen.all() else chosen)

    return where


def condition(machine: "Machine", guard: str) -> Values:
    """Of @%p and @!%p."""
    value = machine.registers[guard.lstrip("!")]
    return ~value if guard.startswith("!") else value
