"""Instructions on float32."""

from collections.abc import Callable

import numpy as np

from ptx.integer import COMPARISONS
from ptx.parse import Instruction, Kernel
from ptx.values import Step, computed, reader

Compute = Callable[..., np.ndarray]
SMALLEST = np.float32(2.0**-126)  # of the normal numbers


NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # the one that arithmetic makes


def canonical(function: Compute) -> Compute:
    def computing(*operands: np.ndarray) -> np.ndarray:
        found = function(*operands)
        bad = np.isnan(found)
        return np.where(bad, NAN, found) if bad.any() else found

    return computing


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once. The product is exact in float64, its sum with c nearly: only where
    that lies half-way between two float32 can a second rounding go wrong."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if halfway.any():
        total = np.where(halfway, _to_odd(product, c.astype(np.float64), total), total)
    return total.astype(np.float32)


def _to_odd(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The sum a + b, moved off the half-way point towards what its rounding has cut off."""
    other = total - a
    error = (a - (total - other)) + (b - other)
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(error == 0, total, np.nextafter(total, towards))


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max: a NaN loses against a number, -0 against +0."""
    found = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), a + b, found)


def smallest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -largest(-a, -b)


def largest_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max.NaN: a NaN wins."""
    return np.where((a == 0) & (b == 0), a + b, np.maximum(a, b))


def smallest_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -largest_nan(-a, -b)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / b


def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


ROUNDED: dict[str, Compute] = {  # .rn is the default, and the only one that Triton asks for
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
}
PLAIN: dict[str, Compute] = {
    "neg": np.negative,
    "abs": np.abs,
    "max": largest,
    "min": smallest,
    "max.NaN": largest_nan,
    "min.NaN": smallest_nan,
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": np.reciprocal,
    "rcp.rn": np.reciprocal,
    "sqrt.approx": np.sqrt,
    "sqrt.rn": np.sqrt,
    "rsqrt.approx": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "tanh.approx": np.tanh,
    "div.full": quotient,
    "div.approx": quotient,
    "div.rn": quotient,
}
# eq and its like are false beside a NaN, equ and its like true.
ORDERED = {name: COMPARISONS[name] for name in ("eq", "lt", "le", "gt", "ge")}
UNORDERED = {f"{name}u": name for name in (*ORDERED, "ne")}


def compare(name: str) -> Compute | None:
    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name in ORDERED:
        return ORDERED[name]
    if name in UNORDERED:
        ordered = COMPARISONS[UNORDERED[name]]
        return lambda a, b: ordered(a, b) | unordered(a, b)
    return None


def decode(kernel: Kernel, found: Instruction) -> Step | None:
    base, *rest = found.opcode.split(".")
    if not rest or rest[-1] != "f32":
        return None
    target, *sources = found.operands
    ftz = "ftz" in rest
    words = [word for word in rest[:-1] if word != "ftz"]
    result = "f32"
    function: Compute | None
    if base == "selp" and not words:
        reads = [reader(kernel, s, k) for s, k in zip(sources, ("f32", "f32", "pred"), strict=True)]
        return computed(kernel, target, "f32", lambda a, b, p: np.where(p, a, b), *reads)
    if base == "setp" and len(words) == 1:
        function, result = compare(words[0]), "pred"
    elif base in ROUNDED and words in ([], ["rn"]):
        function = ROUNDED[base]
    else:
        function = PLAIN.get(".".join([base, *words]))
    if function is None:
        return None
    reads = [reader(kernel, source, "f32") for source in sources]
    if result == "f32" and base not in ("neg", "abs"):
        function = canonical(function)
    if ftz:
        function = _flushing(function, result == "f32")
    return computed(kernel, target, result, function, *reads)


def _flushing(function: Compute, result: bool) -> Compute:
    def flushing(*operands: np.ndarray) -> np.ndarray:
        found = function(*map(flushed, operands))
        return flushed(found) if result else found

    return flushing
