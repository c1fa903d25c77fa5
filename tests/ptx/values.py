"""How an instruction reads its operands and writes its result.

Registers hold unsigned integers of their width, predicates bool; an instruction looks at them as
its types say. An operand of one element stands for all lanes.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.findings import UnknownError
from ptx.parse import Kernel

if TYPE_CHECKING:
    from ptx.machine import Machine

Values = np.ndarray
Mask = np.ndarray | None  # None: every lane
Read = Callable[["Machine"], Values]
Step = Callable[["Machine", Mask], None]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
       for kind, code in (("u", "u"), ("b", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16},
    **{"f16x2": np.uint32, "bf16x2": np.uint32},
}  # fmt: skip
SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%cluster_ctarank")


def dtype_of(name: str) -> np.dtype:
    if name not in TYPES:
        raise UnknownError(f"the type .{name}")
    return np.dtype(TYPES[name])


def unsigned(dtype: np.dtype) -> np.dtype:
    return dtype if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")


def width(kernel: Kernel, register: str) -> np.dtype:
    """Of a register: the unsigned type that holds it."""
    bits = kernel.registers[register.rstrip("0123456789")]
    return np.dtype(np.bool_) if bits == 1 else np.dtype(f"u{bits // 8}")


def reader(kernel: Kernel, operand: str, kind: str) -> Read:
    """What an operand is to an instruction of this type."""
    dtype = dtype_of(kind)
    if operand.startswith(SPECIAL):
        return lambda machine: machine.special[operand].astype(unsigned(dtype)).view(dtype)
    if operand.startswith("%"):
        held = width(kernel, operand)
        if held.itemsize == dtype.itemsize:
            return lambda machine: machine.registers[operand].view(dtype)
        if held.itemsize < dtype.itemsize:
            raise UnknownError(f"{operand} read as .{kind}, which is wider")
        narrow = unsigned(dtype)
        return lambda machine: machine.registers[operand].astype(narrow).view(dtype)
    value = constant(kernel, operand, dtype)
    return lambda machine: value


def constant(kernel: Kernel, operand: str, dtype: np.dtype) -> Values:
    if operand in kernel.shared:
        bits = 0  # the one array of shared memory begins the window
    elif found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
        bits = int(found[1], 16)
    elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
        bits = int(operand.rstrip("U"), 0)
    else:
        raise UnknownError(f"the operand {operand}")
    if dtype == np.bool_:
        return np.array([bits != 0])
    held = unsigned(dtype)
    return np.array([bits & ((1 << 8 * held.itemsize) - 1)], held).view(dtype)


def computed(kernel: Kernel, target: str, kind: str, function: Any, *sources: Read) -> Step:
    """A step that writes function(sources), of type `kind`, to a register."""
    write = writer(kernel, target, kind)

    def step(machine: "Machine", mask: Mask) -> None:
        write(machine, function(*(read(machine) for read in sources)), mask)

    return step


def writer(kernel: Kernel, target: str, kind: str) -> Callable[["Machine", Values, Mask], None]:
    """To a register, extended by the type's sign where that is wider."""
    held = width(kernel, target)
    dtype = dtype_of(kind)
    if held.itemsize < dtype.itemsize:
        raise UnknownError(f"a .{kind} written to {target}, which is narrower")
    extends = held.itemsize > dtype.itemsize

    def write(machine: "Machine", value: Values, mask: Mask) -> None:
        if extends:
            value = value.astype(f"{'i' if dtype.kind == 'i' else 'u'}{held.itemsize}")
        value = value.view(held)
        if mask is not None:
            value = np.where(mask, value, machine.registers[target])
        machine.registers[target] = value

    return write
