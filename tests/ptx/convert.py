"""cvt and mov: from type to type, from registers to pairs of them and back."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.findings import UnknownError
from ptx.parse import Instruction, Kernel, members
from ptx.values import TYPES, Mask, Step, Values, computed, dtype_of, reader, width, writer

if TYPE_CHECKING:
    from ptx.machine import Machine

NAN16 = np.uint16(0x7FFF)


def to_bf16(x: Values) -> Values:
    """The bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def from_bf16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: Values) -> Values:
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def from_f16(bits: Values) -> Values:
    return bits.view(np.float16).astype(np.float32)


def pair(half: Callable[[Values], Values]) -> Callable[[Values, Values], Values]:
    """cvt d, a, b: a is the upper half."""

    def both(a: Values, b: Values) -> Values:
        return half(a).astype(np.uint32) << np.uint32(16) | half(b).astype(np.uint32)

    return both


FLOATS: dict[str, tuple[str, str, Callable[..., Values]]] = {  # result, sources, function
    "rn.bf16.f32": ("b16", "f32", to_bf16),
    "rn.f16.f32": ("b16", "f32", to_f16),
    "f32.bf16": ("f32", "b16", from_bf16),
    "f32.f16": ("f32", "b16", from_f16),
    "rn.bf16x2.f32": ("b32", "f32", pair(to_bf16)),
    "rn.f16x2.f32": ("b32", "f32", pair(to_f16)),
}
SPLIT = {"b16": 8, "b32": 16, "b64": 32}  # bits of a half


def decode(kernel: Kernel, found: Instruction) -> Step | None:
    base, *rest = found.opcode.split(".")
    if base == "cvt":
        return _convert(kernel, found, rest)
    if base != "mov" or len(rest) != 1:
        return None
    target, source = found.operands
    kind = rest[0]
    if target.startswith("{"):
        return _unpack(kernel, members(target), source, kind)
    if source.startswith("{"):
        return _pack(kernel, target, members(source), kind)
    return computed(kernel, target, kind, lambda value: value, reader(kernel, source, kind))


def _convert(kernel: Kernel, found: Instruction, words: list[str]) -> Step | None:
    target, *sources = found.operands
    if (name := ".".join(words)) in FLOATS:
        result, kind, function = FLOATS[name]
        return computed(
            kernel, target, result, function, *(reader(kernel, s, kind) for s in sources)
        )
    rounded = [words[0]] if words[0] in ("rn", "rni", "rzi", "rmi", "rpi") else []
    if len(words) != 2 + len(rounded) or len(sources) != 1:
        return None
    to, of = words[-2:]
    if to not in TYPES or of not in TYPES:
        return None
    whole = [kind[0] in "us" for kind in (to, of)]
    if all(whole) and not rounded:
        dtype = dtype_of(to)
        return computed(
            kernel, target, to, lambda x: x.astype(dtype), reader(kernel, sources[0], of)
        )
    if rounded == ["rn"] and to == "f32" and whole == [False, True]:
        return computed(
            kernel, target, to, lambda x: x.astype(np.float32), reader(kernel, sources[0], of)
        )
    if rounded == ["rzi"] and of == "f32" and whole == [True, False]:
        return computed(kernel, target, to, _truncated(to), reader(kernel, sources[0], of))
    return None


def _truncated(to: str) -> Callable[[Values], Values]:
    """Towards zero, held in the type's range; NaN is 0."""
    dtype = dtype_of(to)
    limits = np.iinfo(dtype)

    def convert(x: Values) -> Values:
        cut = np.trunc(np.where(np.isnan(x), 0.0, x.astype(np.float64)))
        low, high = cut <= limits.min, cut >= limits.max
        inside = np.where(low | high, 0.0, cut).astype(dtype)
        return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))

    return convert


def _unpack(kernel: Kernel, targets: list[str], source: str, kind: str) -> Step:
    """mov.b32 {low, high}, r."""
    bits = _half(kind, targets)
    read = reader(kernel, source, kind)
    writes = [(writer(kernel, t, f"b{bits}"), i * bits) for i, t in enumerate(targets) if t != "_"]
    half = np.dtype(f"u{bits // 8}")

    def step(machine: "Machine", mask: Mask) -> None:
        value = read(machine)
        for write, shift in writes:
            write(machine, (value >> value.dtype.type(shift)).astype(half), mask)

    return step


def _pack(kernel: Kernel, target: str, sources: list[str], kind: str) -> Step:
    bits = _half(kind, sources)
    whole = width(kernel, target)

    def joined(low: Values, high: Values) -> Values:
        return low.astype(whole) | high.astype(whole) << whole.type(bits)

    reads = [reader(kernel, source, f"b{bits}") for source in sources]
    return computed(kernel, target, kind, joined, *reads)


def _half(kind: str, parts: list[str]) -> int:
    if kind not in SPLIT or len(parts) != 2:
        raise UnknownError(f"mov.{kind} of {len(parts)} parts")
    return SPLIT[kind]
