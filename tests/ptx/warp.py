"""What crosses the lanes of a warp: shuffles and reductions. All 32 must be there."""

from typing import TYPE_CHECKING

import numpy as np

from ptx.findings import UnknownError
from ptx.parse import Instruction, Kernel
from ptx.values import Mask, Read, Step, Values, reader, writer

if TYPE_CHECKING:
    from ptx.machine import Machine

LANES = 32
REDUCTIONS = {
    **{"max": np.maximum, "min": np.minimum, "add": np.add},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


def whole(machine: "Machine", mask: Mask, found: Instruction) -> None:
    """Reports the lanes of warps that are here in part."""
    if mask is None:
        return
    here = mask.reshape(-1, LANES)
    torn = here.any(1) & ~here.all(1)
    if torn.any():
        machine.report("a warp that is not whole", found, int(here[torn].sum()))


def of_all_lanes(kernel: Kernel, found: Instruction) -> Step:
    """The check of an instruction whose last operand says which lanes take part."""
    read = reader(kernel, found.operands[-1], "b32")

    def check(machine: "Machine", mask: Mask) -> None:
        whole(machine, mask, found)
        given = read(machine)
        given = given if mask is None else machine.spread(given)[mask]
        if (given != 0xFFFFFFFF).any():
            raise UnknownError(f"a part of a warp: {found}")

    return check


def decode(kernel: Kernel, found: Instruction) -> Step | None:
    words = found.opcode.split(".")
    if words[:2] == ["shfl", "sync"] and words[3:] == ["b32"]:
        return _shuffle(kernel, found, words[2])
    if words[:2] == ["redux", "sync"] and len(words) == 4:
        return _reduce(kernel, found, words[2], words[3])
    if words == ["bar", "warp", "sync"]:
        return of_all_lanes(kernel, found)
    return None


def _shuffle(kernel: Kernel, found: Instruction, how: str) -> Step | None:
    """The value of another lane; c = 31: of any of the warp (0 for up)."""
    target, source, lane, clamp, _ = found.operands
    if how not in ("bfly", "idx", "up", "down") or "|" in target:
        return None
    if clamp != ("0" if how == "up" else "31"):
        raise UnknownError(f"{found.opcode} in segments ({clamp})")
    check = of_all_lanes(kernel, found)
    read, read_lane = reader(kernel, source, "b32"), reader(kernel, lane, "u32")
    write = writer(kernel, target, "b32")

    def step(machine: "Machine", mask: Mask) -> None:
        check(machine, mask)
        values = machine.spread(read(machine)).reshape(-1, LANES)
        other = machine.spread(read_lane(machine)).reshape(-1, LANES).astype(np.int64) & 31
        own = np.arange(LANES)
        other = {"bfly": own ^ other, "idx": other, "up": own - other, "down": own + other}[how]
        other = np.where((other >= 0) & (other < LANES), other, own)
        write(machine, np.take_along_axis(values, other, 1).reshape(-1), mask)

    return step


def _reduce(kernel: Kernel, found: Instruction, how: str, kind: str) -> Step | None:
    target, source, _ = found.operands
    if how not in REDUCTIONS or kind not in ("s32", "u32", "b32"):
        return None
    check = of_all_lanes(kernel, found)
    read: Read = reader(kernel, source, kind)
    write = writer(kernel, target, kind)

    def step(machine: "Machine", mask: Mask) -> None:
        check(machine, mask)
        values = machine.spread(read(machine)).reshape(-1, LANES)
        found_values: Values = REDUCTIONS[how].reduce(values, axis=1, keepdims=True)
        write(machine, np.repeat(found_values, LANES, 1).reshape(-1).astype(values.dtype), mask)

    return step
