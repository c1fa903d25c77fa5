"""Instructions on integers, bits and predicates."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.findings import UnknownError
from ptx.parse import Instruction, Kernel
from ptx.values import Step, computed, dtype_of, reader, unsigned

Compute = Callable[..., np.ndarray]


def shift_left(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By 32 bits and more (64, ...) nothing is left."""
    bits = 8 * a.itemsize
    count = np.minimum(b, bits - 1).astype(a.dtype)
    return np.where(b >= bits, a.dtype.type(0), a << count)


def shift_right(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sign fills signed ones."""
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b >= bits, a.dtype.type(0), shifted)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. By zero all bits are set, as on every card; the ISA does not say."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    return np.where(zero, ~a.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the sign of a."""
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))


def extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from `position` on; of signed ones the highest of them is the sign."""
    bits = 8 * a.itemsize
    position, length = position & 0xFF, length & 0xFF
    held = shift_right(a.view(unsigned(a.dtype)), position)
    above = bits - np.minimum(length, bits)
    raised = shift_left(held, above)
    result = shift_right(raised.view(a.dtype), above)
    return np.where(length == 0, a.dtype.type(0), result)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each four bits of the selector name a byte of b:a, or (8) its sign in all bits."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        byte = byte.astype(np.uint32)
        sign = np.where(byte >> np.uint32(7) != 0, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8) != 0, sign, byte) << np.uint32(8 * i)
    return result


def wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.itemsize > 4:
        raise UnknownError("mul.hi of 64 bits")
    product = a.astype(wide(a.dtype)) * b.astype(wide(a.dtype))
    return (product >> wide(a.dtype).type(8 * a.itemsize)).astype(a.dtype)


SAME: dict[str, tuple[int, Compute]] = {  # operands and result of one type
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "div": (2, divide),
    "rem": (2, remainder),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "neg": (1, lambda a: -a),
    "abs": (1, np.abs),
}
BITS: dict[str, tuple[int, Compute]] = {
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
    "not": (1, np.invert),
}
COMPARISONS: dict[str, Compute] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}


def decode(kernel: Kernel, found: Instruction) -> Step | None:
    """The step of an instruction of this group; None where it is of another."""
    base, *rest = found.opcode.split(".")
    target, *sources = found.operands
    kind = rest[-1] if rest else ""
    if base in BITS and len(rest) == 1:
        count, function = BITS[base]
        return _same(kernel, found, function, count)
    if kind[:1] not in ("s", "u", "b") or (kind[:1] == "b" and base not in MIXED):
        return None
    if base in SAME and len(rest) == 1:
        count, function = SAME[base]
        return _same(kernel, found, function, count)
    if base in ("mul", "mad") and len(rest) == 2:
        return _product(kernel, found, base, rest[0], kind)
    if base not in MIXED or len(rest) != (2 if base == "setp" else 1):
        return None
    if base == "setp":
        if rest[0] not in COMPARISONS:
            return None
        reads = [reader(kernel, source, kind) for source in sources]
        return computed(kernel, target, "pred", COMPARISONS[rest[0]], *reads)
    kinds, function = MIXED[base]
    wanted = [kind if each == "own" else each for each in kinds]
    reads = [reader(kernel, *pair) for pair in zip(sources, wanted, strict=True)]
    return computed(kernel, target, kind, function, *reads)


MIXED: dict[str, tuple[tuple[str, ...], Any]] = {  # the types of the sources; `own`: the opcode's
    "setp": ((), None),
    "shl": (("own", "u32"), shift_left),
    "shr": (("own", "u32"), shift_right),
    "bfe": (("own", "u32", "u32"), extract_bits),
    "prmt": (("b32", "b32", "b32"), permute_bytes),
    "selp": (("own", "own", "pred"), lambda a, b, chosen: np.where(chosen, a, b)),
}


PRODUCTS: dict[str, Compute] = {"lo": np.multiply, "hi": multiply_high}


def _same(kernel: Kernel, found: Instruction, function: Compute, count: int) -> Step:
    target, *sources = found.operands
    kind = found.opcode.split(".")[-1]
    if len(sources) != count:
        raise UnknownError(f"{found.opcode} of {len(sources)} operands")
    return computed(kernel, target, kind, function, *(reader(kernel, s, kind) for s in sources))


def _product(kernel: Kernel, found: Instruction, base: str, part: str, kind: str) -> Step | None:
    """mul.lo, mul.hi, mul.wide, and mad, which adds a third operand."""
    target, *sources = found.operands
    dtype = dtype_of(kind)
    result = kind
    product: Compute
    if part == "wide":
        result = f"{kind[0]}{2 * int(kind[1:])}"
        double = wide(dtype)

        def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return a.astype(double) * b.astype(double)
    elif part in ("lo", "hi"):
        product = PRODUCTS[part]
    else:
        return None
    reads = [reader(kernel, source, kind) for source in sources[:2]]
    if base == "mul":
        return computed(kernel, target, result, product, *reads)
    reads.append(reader(kernel, sources[2], result))
    return computed(kernel, target, result, lambda a, b, c: product(a, b) + c, *reads)
